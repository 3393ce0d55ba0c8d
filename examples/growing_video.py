"""Frames of a video file that another program is still writing: MPEG-TS, Matroska or fragmented MP4."""

import math
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np


POLL_SECONDS = 0.05
# FFmpeg would otherwise look at a second of video before it gives the first frame.
OPEN_OPTIONS = {"analyzeduration": "1", "fpsprobesize": "0"}
FORMATS = "write MPEG-TS, Matroska or fragmented MP4 (-movflags frag_keyframe+empty_moov)"


class TimedFrame(NamedTuple):
    """
    seconds (`float`): when the frame is presented, after the first one; never falls.
    image (`np.ndarray` of shape `(height, width, 3)`, uint8): RGB.
    """

    seconds: float
    image: np.ndarray


class GrowingFile:
    """
    A file that is read as a pipe is: `read` waits for bytes that are not yet there.

    Args:
        path (`str` or `os.PathLike`): need not exist yet.
        patience (`float`): seconds without a new byte after which the file counts as complete, or as not coming.

    Raises:
        ValueError: if it does not appear in that time.
    """

    def __init__(self, path: str | os.PathLike, patience: float):
        self.path = os.fspath(path)
        self.patience = patience
        self.is_complete = False
        end = time.monotonic() + patience
        while not os.path.isfile(self.path):
            if time.monotonic() > end:
                raise ValueError(f"{self.path} did not appear within {patience} seconds.")
            time.sleep(POLL_SECONDS)
        self.file = open(self.path, "rb")

    def read(self, size: int) -> bytes:
        """
        Returns at least one byte and at most `size`; none where no more came in time, and from then on.

        Raises:
            ValueError: if the file became shorter than what was read of it.
        """
        end = time.monotonic() + self.patience
        while not self.is_complete:
            if data := self.file.read(size):
                return data
            if os.fstat(self.file.fileno()).st_size < self.file.tell():
                raise ValueError(f"{self.path} became shorter while it was read; a recording must only grow.")
            # FFmpeg asks several times at the end.
            self.is_complete = time.monotonic() >= end
            time.sleep(POLL_SECONDS)
        return b""

    def close(self) -> None:
        self.file.close()


def read_frames(path: str | os.PathLike, fps: float, patience: float) -> Iterator[TimedFrame]:
    """
    Reads a file while it grows, and until it has not grown for a while. A packet that is not yet complete is waited
    for; one that never is, and frames that cannot be decoded, are left out.

    Args:
        path (`str` or `os.PathLike`): need not exist yet.
        fps (`float`): at most so many frames a second are given, evenly spaced.
        patience (`float`): seconds without a new byte after which the file counts as complete.

    Yields:
        `TimedFrame`: as soon as it can be decoded.

    Raises:
        ValueError: if the file does not appear, becomes shorter, or has no frame that can be read while it grows.
    """
    if not 0 < fps < float("inf"):
        raise ValueError(f"`fps` must be a positive number, got {fps}.")
    file = GrowingFile(path, patience)
    try:
        frames = _sample(_decode(file), fps)
        first = next(frames, None)
        if first is None:
            raise ValueError(f"{file.path} has no frame that can be decoded while it grows; {FORMATS}.")
        yield first
        yield from frames
    finally:
        file.close()


def _decode(file: GrowingFile) -> Iterator[av.VideoFrame]:
    try:
        container = av.open(file, options=OPEN_OPTIONS, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise ValueError(f"{file.path} cannot be read as a video that grows ({error}); {FORMATS}.") from error
    with container:
        # A stream of an unknown codec has no context.
        streams = [stream for stream in container.streams.video if stream.codec_context is not None]
        if not streams:
            raise ValueError(f"{file.path} has no video stream that can be decoded.")
        stream = streams[0]
        # Threads that decode a frame each would hold back as many frames.
        stream.thread_type = "SLICE"
        for packet in _packets(container, stream):
            try:
                frames = packet.decode() if packet is not None else stream.codec_context.decode(None)
            except av.error.FFmpegError:
                continue
            yield from (frame for frame in frames if _has_time(frame) and not frame.is_corrupt)


def _has_time(frame: av.VideoFrame) -> bool:
    # Not a number where a damaged file has no time base.
    return frame.time is not None and math.isfinite(frame.time)


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet | None]:
    """The packets that are whole; `None` at the end of a damaged file, after which the decoder gives what it holds."""
    try:
        yield from (packet for packet in container.demux(stream) if not packet.is_corrupt)
    except av.error.FFmpegError:
        yield None
    except IndexError:
        # At the end PyAV stumbles over streams that began in the middle; all packets of this one have been given.
        return


def _sample(frames: Iterator[av.VideoFrame], fps: float) -> Iterator[TimedFrame]:
    first = None
    for frame in frames:
        if first is None:
            first, last, next_slot, size = frame.time, frame.time, 0, (frame.width, frame.height)
        # A recorder that starts again begins at an earlier time: go on from the last one.
        first -= max(0.0, last - frame.time)
        last = frame.time
        seconds = frame.time - first
        # A little less, or rounded times would miss their slots.
        slot = int(seconds * fps + 1e-3)
        if slot >= next_slot:
            next_slot = slot + 1
            # All get the size of the first one, should it change.
            yield TimedFrame(seconds, frame.to_ndarray(format="rgb24", width=size[0], height=size[1]))


def in_chunks(frames: Iterator[TimedFrame], seconds: float) -> Iterator[list[TimedFrame]]:
    """
    Groups frames by time.

    Args:
        frames (`Iterator[TimedFrame]`): see `read_frames`.
        seconds (`float`): length of a chunk.

    Yields:
        `list[TimedFrame]`: the frames of each chunk that has any, when the next chunk begins or the video ends.

    Raises:
        ValueError: if `seconds` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"a chunk must have more than 0 seconds, got {seconds}.")
    chunk: list[TimedFrame] = []
    for frame in frames:
        if chunk and int(frame.seconds / seconds) > int(chunk[0].seconds / seconds):
            yield chunk
            chunk = []
        chunk.append(frame)
    if chunk:
        yield chunk
