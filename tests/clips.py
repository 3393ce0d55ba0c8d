"""Real video files whose every frame tells its own number."""

import av
import numpy as np


SIDE = 64
NUM_BITS = 8


def number_image(number):
    """An image of eight stripes, black or white: the number's bits."""
    bits = [(number >> bit) & 1 for bit in range(NUM_BITS)]
    row = np.repeat(np.array(bits, dtype=np.uint8) * 255, SIDE // NUM_BITS)
    return np.broadcast_to(row[None, :, None], (SIDE, SIDE, 3)).copy()


def read_numbers(frames):
    """The numbers of decoded frames of shape (num_frames, height, width, 3)."""
    height, width = frames.shape[1:3]
    middles = (np.arange(NUM_BITS) + 0.5) * width / NUM_BITS
    bits = frames[:, height // 2, middles.astype(int), 1] > 127
    return (bits * 2 ** np.arange(NUM_BITS)).sum(-1).tolist()


def write_clip(
    path, num_frames, fps=4, codec="mpeg4", first_pts=0, rotation=0, times=None, encoder=None, **container_options
):
    """
    A clip of `num_frames` frames, numbered from 0. Returns its path.

    `times` are the frames' places on a clock of `fps` ticks a second, for a variable frame rate; `encoder` holds the
    encoder's settings, among them `gop_size`, `pix_fmt` and `side`.
    """
    with av.open(str(path), mode="w", container_options=container_options) as container:
        stream = add_stream(container, codec, fps, **(encoder or {}))
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(number_image(i), format="rgb24")
            frame.pts = i + first_pts if times is None else times[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def add_stream(container, codec, fps=4, gop_size=5, pix_fmt="yuv420p", side=SIDE, **codec_options):
    stream = container.add_stream(codec, rate=fps, options=codec_options)
    stream.width, stream.height, stream.pix_fmt, stream.gop_size = side, side, pix_fmt, gop_size
    return stream


def write_hdr_clip(path, codes, transfer, codec):
    """
    A clip of three frames with a gray bar for each code value in [0, 1], of ten bits in BT.2020; `transfer` is
    FFmpeg's number of the curve. Returns its path.
    """
    name = {1: "bt709", 2: "undef", 14: "bt2020-10", 16: "smpte2084", 18: "arib-std-b67"}[transfer]
    options = {"x265-params": f"log-level=none:bframes=0:transfer={name}"} if codec == "libx265" else {}
    levels = np.round(64 + 876 * np.array(codes)).astype(np.uint16).repeat(SIDE // 4)
    with av.open(str(path), mode="w") as container:
        stream = add_stream(container, codec, pix_fmt="yuv420p10le", crf="5", **options)
        stream.width = len(levels)
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, transfer, 9, 1
        frame = av.VideoFrame(len(levels), SIDE, "yuv420p10le")
        for plane, row in zip(frame.planes, (levels, np.full(len(levels) // 2, 512), np.full(len(levels) // 2, 512))):
            padded = np.zeros((plane.height, plane.line_size // 2), dtype=np.uint16)
            padded[:, : plane.width] = row
            plane.update(padded)
        for number in range(3):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def silence():
    """A sound frame that an encoder takes."""
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
    frame.sample_rate = 16000
    return frame


def write_audio(path, cover=False):
    """A sound file without video, or with a cover image in place of one. Returns its path."""
    with av.open(str(path), mode="w") as container:
        sound = container.add_stream("aac", rate=16000)
        if cover:
            image = container.add_stream("mjpeg", rate=1)
            image.width, image.height, image.pix_fmt = SIDE, SIDE, "yuvj420p"
            image.disposition = av.stream.Disposition.attached_pic
            container.mux(image.encode(av.VideoFrame.from_ndarray(number_image(1), format="rgb24")))
            container.mux(image.encode())
        container.mux(sound.encode(silence()))
        container.mux(sound.encode())
    return path
