"""Times how long it takes to read 64 sampled frames of 1080p files: by seeking, decoding in order, and natively."""

import argparse
import time
from pathlib import Path

import av
import numpy as np
from transformers.video_utils import load_video

from modeling_stts.stts_decoding import InOrderDecoder
from modeling_stts.stts_video import read_video


FPS, WIDTH, HEIGHT, GOP_SECONDS, PIECE_SECONDS = 24, 1920, 1080, 5, 10


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("decoding"), help="where the files are, or are made")
    parser.add_argument("--seconds", type=int, nargs="+", default=[10, 600, 7200], help="how long each file is")
    parser.add_argument("--num-frames", type=int, default=64, help="how many frames are sampled")
    parser.add_argument("--repeat", type=int, default=1, help="of so many runs the fastest counts")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    print("| seconds | MB | by seeking | in order | transformers |\n|---|---|---|---|---|")
    for seconds in arguments.seconds:
        path = make_file(arguments.folder, seconds)
        row = [fastest(read, path, arguments) for read in (read_by_seeking, read_in_order, read_natively)]
        size = path.stat().st_size / 1e6
        print(f"| {seconds} | {size:.0f} | {' | '.join(f'{time:.2f} s' for time in row)} |", flush=True)


def make_file(folder, seconds):
    path, piece = folder / f"{seconds}.mp4", folder / "piece.mp4"
    if not piece.exists():
        encode_piece(piece)
    if not path.exists():
        repeat_piece(piece, path, seconds // PIECE_SECONDS)
    return path


def encode_piece(path):
    """Moving noise of several sizes, in H.264 with B-frames."""
    noise = np.random.default_rng(0).normal(size=(HEIGHT // 8, WIDTH // 8, 3)).cumsum(0).cumsum(1)
    noise = (128 + 60 * noise / noise.std()).clip(0, 255).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), mode="w") as container:
        options = {"preset": "veryfast", "x264-params": f"keyint={GOP_SECONDS * FPS}:scenecut=0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", 2_000_000
        for number in range(PIECE_SECONDS * FPS):
            image = np.roll(noise, (3 * number, 5 * number), axis=(0, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def repeat_piece(piece, path, times):
    with av.open(str(path), mode="w") as target:
        stream = None
        for number in range(times):
            with av.open(str(piece)) as source:
                template = source.streams.video[0]
                stream = stream or target.add_stream_from_template(template)
                shift = int(number * PIECE_SECONDS / template.time_base)
                for packet in source.demux(template):
                    if packet.size:
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                        target.mux(packet)


def fastest(read, path, arguments):
    times = []
    for _ in range(arguments.repeat):
        begin = time.perf_counter()
        frames = read(path, arguments.num_frames)
        times.append(time.perf_counter() - begin)
        assert frames.shape == (arguments.num_frames, HEIGHT, WIDTH, 3)
    return min(times)


def choose(num_frames, total):
    return (np.arange(num_frames) * total // num_frames).tolist()


def read_by_seeking(path, num_frames):
    return read_video(path, lambda metadata: choose(num_frames, metadata.total_num_frames))[0]


def read_in_order(path, num_frames):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = InOrderDecoder(stream).read(choose(num_frames, stream.frames))
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def read_natively(path, num_frames):
    return load_video(str(path), num_frames=num_frames, backend="pyav")[0]


if __name__ == "__main__":
    main()
