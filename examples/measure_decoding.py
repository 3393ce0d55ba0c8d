"""Times how long it takes to read sampled frames of 1080p files: by this package, by transformers and by torchcodec.

Each reads once in a process of its own, where the memory is measured that comes on top. Then all read in turns, in
random order, which gives the medians of the seconds that pass and of the seconds of all processors.
"""

import argparse
import multiprocessing
import random
import re
import statistics
import time
from pathlib import Path

import av
import numpy as np
from transformers.video_utils import load_video

from modeling_stts.stts_video import read_video


FPS, WIDTH, HEIGHT, GOP_SECONDS, PIECE_SECONDS = 24, 1920, 1080, 5, 10
# What takes more seconds is read once.
LONG = 20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("decoding"), help="where the files are, or are made")
    parser.add_argument("--seconds", type=int, nargs="+", default=[10, 600, 7200], help="how long each file is")
    parser.add_argument("--num-frames", type=int, nargs="+", default=[64, 256], help="how many frames are sampled")
    parser.add_argument("--repeat", type=int, default=5, help="how often each reading is done, if it is short")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    readers = {"this package": read_by_seeking, "transformers, PyAV": read_natively}
    files = {seconds: make_file(arguments.folder, seconds) for seconds in arguments.seconds}
    if can_run_torchcodec(next(iter(files.values()))):
        readers["transformers, torchcodec"] = read_by_torchcodec
    print(f"| seconds | MB | frames | {' | '.join(readers)} |\n|{'---|' * (len(readers) + 3)}")
    for seconds, path in files.items():
        for num_frames in arguments.num_frames:
            num_frames = min(num_frames, seconds * FPS)
            cells = measure(readers.values(), path, num_frames, arguments.repeat)
            size = path.stat().st_size / 1e6
            print(f"| {seconds} | {size:.0f} | {num_frames} | {' | '.join(cells)} |", flush=True)


def can_run_torchcodec(path):
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(path)
    except (ImportError, OSError, RuntimeError):
        # Not installed, or there is no FFmpeg for it, which it looks for when it is used.
        return False
    return True


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


def measure(readers, path, num_frames, repeat):
    """One cell of the table for each reader."""
    alone, in_turns = {}, {}
    for read in readers:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            alone[read] = pool.apply(run, (read, path, num_frames))
        in_turns[read] = [alone[read]] if alone[read][0] > LONG else []
    readers = [read for read in readers if alone[read][0] <= LONG]
    random_order = random.Random(0)
    for _ in range(repeat):
        # Memory that the system took back after the reading before takes longer to get.
        for read in random_order.sample(readers, len(readers)):
            in_turns[read].append(run(read, path, num_frames))
    times = [[statistics.median(values) for values in zip(*results)] for results in in_turns.values()]
    return [
        f"{wall:.2f} s, {cpu:.2f} s, {memory:.0f} MiB" for (wall, cpu, _), (_, _, memory) in zip(times, alone.values())
    ]


def run(read, path, num_frames):
    memory = peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    frames = read(path, num_frames)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert frames.shape == (num_frames, HEIGHT, WIDTH, 3)
    return wall, cpu, peak_memory() - memory


def peak_memory():
    """In MiB, by Linux. What `getrusage` says begins with that of the process that started this one."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def choose(num_frames, total):
    return (np.arange(num_frames) * total // num_frames).tolist()


def read_by_seeking(path, num_frames):
    return read_video(path, lambda metadata: choose(num_frames, metadata.total_num_frames))[0]


def read_natively(path, num_frames, backend="pyav"):
    return load_video(
        str(path),
        backend=backend,
        sample_indices_fn=lambda metadata, **_: choose(num_frames, metadata.total_num_frames),
    )[0]


def read_by_torchcodec(path, num_frames):
    # Channels come first.
    return read_natively(path, num_frames, "torchcodec").permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
    main()
