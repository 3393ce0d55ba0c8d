"""Reads the sampled frames of a video file with PyAV. Knows no video language model."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub.utils import httpx
from transformers.video_utils import VideoMetadata


class FrameCount(NamedTuple):
    """
    How many frames a file is expected to have.

    num_frames (`int`).
    is_declared (`bool`): whether the container's header says so; else packets were counted.
    """

    num_frames: int
    is_declared: bool


class SampledVideo(NamedTuple):
    """
    frames (`np.ndarray` of shape `(num_frames, height, width, 3)`, uint8): RGB; those past the end are undefined.
    metadata (`VideoMetadata`): of the file, with the sampled `frames_indices`.
    num_decoded (`int`): frames decoded, up to the last sampled one or the end.
    is_complete (`bool`): whether all sampled frames were decoded.
    error (`Exception`, *optional*): what ended the decoding too early.
    """

    frames: np.ndarray
    metadata: VideoMetadata
    num_decoded: int
    is_complete: bool
    error: Exception | None


def read_video(
    path: str | os.PathLike, sample_indices_fn: Callable[..., Any] | None = None
) -> tuple[np.ndarray, VideoMetadata]:
    """
    Decodes a file once, in order, and keeps the sampled frames only.

    A file that ends at most `max(2, 2 %)` frames before its header says so is sampled again from its real number of
    frames. Rotated recordings (phones) are turned upright.

    Args:
        path (`str` or `os.PathLike`): a local file, or an http(s) address.
        sample_indices_fn (`Callable`, *optional*):
            Called as `sample_indices_fn(metadata=metadata)`, returns ascending, unique frame indices in
            `[0, metadata.total_num_frames)`. All frames if not given.

    Returns:
        `tuple`: frames, `np.ndarray` of shape `(num_frames, height, width, 3)`, uint8, RGB; and their
        `VideoMetadata`: `fps` is the average rate in frames per second, `duration` in seconds, `width` and `height`
        in pixels, `frames_indices` as sampled.

    Raises:
        ValueError: if the path is not a file with a video stream whose sampled frames can all be decoded.
        ImportError: if PyAV is not installed.
    """
    path = os.fspath(path)
    source = _find_source(path)
    expected = _count_frames(path, source)
    video = _sample(path, source, expected.num_frames, sample_indices_fn)
    if not video.is_complete:
        _check_end(path, expected, video)
        video = _sample(path, source, video.num_decoded, sample_indices_fn)
    if not video.is_complete:
        raise ValueError(f"Frame {video.num_decoded} of {path} cannot be decoded: {video.error}") from video.error
    return video.frames, video.metadata


def paths_as_strings(videos: Any) -> Any:
    """Turns every path object of a video input, nested lists included, into a string."""
    if isinstance(videos, os.PathLike):
        return os.fspath(videos)
    if isinstance(videos, (list, tuple)):
        return [paths_as_strings(video) for video in videos]
    return videos


def _find_source(path: str) -> str | bytes:
    """An absolute path (a relative one with a colon would be read as an address), or what was downloaded."""
    if path.startswith(("http://", "https://")):
        return _download(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a directory; a video must be a file or an http(s) address.")
    if not os.path.exists(path):
        raise ValueError(f"{path} does not exist; a video must be a file or an http(s) address.")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty (0 bytes), so it is not a video.")
    return os.path.abspath(path)


def _download(url: str) -> bytes:
    try:
        content = httpx.get(url, follow_redirects=True).raise_for_status().content
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{url} cannot be downloaded: {error}") from error
    if not content:
        raise ValueError(f"{url} is empty (0 bytes), so it is not a video.")
    return content


def _import_av() -> ModuleType:
    # In a `try`, or loading a hub folder would need PyAV even where no video is decoded.
    try:
        import av
    except ImportError as error:
        raise ImportError("Decoding a video file needs PyAV: pip install av") from error
    return av


@contextmanager
def _open_stream(path: str, source: str | bytes) -> Iterator[Any]:
    av = _import_av()
    try:
        with av.open(BytesIO(source) if isinstance(source, bytes) else source, metadata_errors="replace") as container:
            yield _video_stream(path, container)
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} is not a video that FFmpeg can read: {error}") from error


def _video_stream(path: str, container: Any) -> Any:
    # FFmpeg draws plain text files as if they were terminal animations.
    if container.format.name == "tty":
        raise ValueError(f"{path} is a text file, not a video.")
    cover_image = _import_av().stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover_image]
    if not streams:
        raise ValueError(f"{path} has no video stream (streams: {[stream.type for stream in container.streams]}).")
    streams[0].thread_type = "AUTO"
    return streams[0]


def _count_frames(path: str, source: str | bytes) -> FrameCount:
    with _open_stream(path, source) as stream:
        if stream.frames and not _is_trimmed(stream):
            return FrameCount(stream.frames, is_declared=True)
        packets = stream.container.demux(stream)
        num_frames = sum(packet.size > 0 and not packet.is_discard for packet in packets)
    if num_frames == 0:
        raise ValueError(f"{path} has a video stream without frames.")
    return FrameCount(num_frames, is_declared=False)


def _is_trimmed(stream: Any) -> bool:
    """Whether an edit list hides frames that the header counts."""
    if stream.duration is None or not stream.average_rate:
        return False
    shown = stream.duration * stream.time_base * stream.average_rate
    return shown < stream.frames - _tolerance(stream.frames)


def _tolerance(num_frames: int) -> float:
    return max(2, 0.02 * num_frames)


def _sample(path: str, source: str | bytes, num_frames: int, sample_indices_fn: Callable | None) -> SampledVideo:
    with _open_stream(path, source) as stream:
        metadata = _metadata(stream, num_frames)
        indices = list(range(num_frames)) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
        video = _decode(stream, [int(index) for index in indices], metadata)
    metadata.frames_indices = indices
    metadata.height, metadata.width = video.frames.shape[1:3]
    return video


def _metadata(stream: Any, num_frames: int) -> VideoMetadata:
    fps = float(stream.average_rate) if stream.average_rate else None
    return VideoMetadata(
        total_num_frames=num_frames,
        fps=fps,
        duration=num_frames / fps if fps else None,
        width=stream.width,
        height=stream.height,
        video_backend="pyav",
    )


def _decode(stream: Any, indices: list[int], metadata: VideoMetadata) -> SampledVideo:
    slots = {index: slot for slot, index in enumerate(indices)}
    frames = np.empty((len(indices), 0, 0, 3), dtype=np.uint8)
    num_decoded, error = 0, None
    try:
        for index, frame in enumerate(stream.container.decode(stream)):
            num_decoded = index + 1
            if index in slots:
                image = _upright_rgb(frame, metadata)
                if slots[index] == 0:
                    frames = np.empty((len(indices), *image.shape), dtype=np.uint8)
                frames[slots[index]] = image
            if index == indices[-1]:
                break
    except _import_av().error.FFmpegError as decode_error:
        error = decode_error
    return SampledVideo(frames, metadata, num_decoded, num_decoded > indices[-1], error)


def _upright_rgb(frame: Any, metadata: VideoMetadata) -> np.ndarray:
    # The size may change within a stream; all frames get the first one's.
    image = frame.to_ndarray(format="rgb24", width=metadata.width, height=metadata.height)
    return np.rot90(image, round(frame.rotation / 90))


def _check_end(path: str, expected: FrameCount, video: SampledVideo) -> None:
    """Raises for a file that ends too early. Counted packets need not all hold a frame, so there any end is fine."""
    missing = expected.num_frames - video.num_decoded
    is_broken = expected.is_declared or video.error is not None
    if video.num_decoded == 0 or (is_broken and missing > _tolerance(expected.num_frames)):
        raise ValueError(
            f"{path} should have {expected.num_frames} frames, but only {video.num_decoded} can be decoded "
            f"(truncated or damaged?): {video.error or 'the file ends there'}."
        ) from video.error


__all__ = ["paths_as_strings", "read_video"]
