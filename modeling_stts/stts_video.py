"""Decodes a video file with PyAV, keeping only the frames that were asked for."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata


def read_video(path: str, sample_indices_fn: Callable) -> tuple[np.ndarray, VideoMetadata]:
    """
    Decodes the sampled frames of a video, in one pass from the start.

    Args:
        path (`str`): a file, or a URL that FFmpeg opens.
        sample_indices_fn (`Callable`):
            Called with `metadata=` (`VideoMetadata`); returns the indices of the frames to keep, rising, from 0.

    Returns:
        `tuple[np.ndarray, VideoMetadata]`: RGB frames of shape `(num_frames, height, width, 3)`, uint8, and where they
        come from; a frame's time in seconds is its index divided by `fps`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no readable video, or ends much earlier than its header says.
    """
    _check_file(path)
    metadata = _read_metadata(path)
    frames, num_decoded = _decode(path, metadata, sample_indices_fn)
    if len(frames) < len(metadata.frames_indices):
        _check_not_truncated(path, metadata.total_num_frames, num_decoded)
        # Headers are often a frame or two off. What can be decoded counts.
        metadata.total_num_frames = num_decoded
        frames, _ = _decode(path, metadata, sample_indices_fn)
    return np.stack(frames), metadata


def paths_as_strings(videos: Any) -> Any:
    """Videos with every `pathlib.Path` in them, at any depth of lists, as a string, which transformers expects."""
    if isinstance(videos, Path):
        return str(videos)
    if isinstance(videos, (list, tuple)):
        return [paths_as_strings(video) for video in videos]
    return videos


def _check_file(path: str) -> None:
    if "://" in path:
        return
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no video file {path!r}.")
    if os.path.isdir(path):
        raise ValueError(f"{path!r} is a folder. A video must be a file, or frames given as arrays.")
    if os.path.getsize(path) == 0:
        raise ValueError(f"The video file {path!r} is empty (0 bytes).")


def _check_not_truncated(path: str, num_declared: int, num_decoded: int) -> None:
    if num_declared - num_decoded > max(2, num_declared // 50) or num_decoded == 0:
        raise ValueError(
            f"The video {path!r} says that it has {num_declared} frames, but only {num_decoded} can be decoded. It is "
            "truncated or damaged."
        )


def _open(path: str):
    import av

    try:
        container = av.open(path)
    except av.FFmpegError as error:
        raise ValueError(f"{path!r} cannot be read as a video: {error.strerror}.") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path!r} has no video stream.")
    container.streams.video[0].thread_type = "AUTO"
    return container


def _read_metadata(path: str) -> VideoMetadata:
    with _open(path) as container:
        stream = container.streams.video[0]
        num_frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        if num_frames == 0:
            raise ValueError(f"The video {path!r} has no frames.")
        rate = stream.average_rate or stream.guessed_rate
        return VideoMetadata(
            total_num_frames=num_frames,
            fps=float(rate) if rate else None,
            duration=num_frames / float(rate) if rate else None,
            width=stream.width,
            height=stream.height,
            video_backend="pyav",
        )


def _decode(path: str, metadata: VideoMetadata, sample_indices_fn: Callable) -> tuple[list[np.ndarray], int]:
    """The sampled frames, and how many frames were decoded until the last of them or the end."""
    import av

    metadata.frames_indices = [int(idx) for idx in sample_indices_fn(metadata=metadata)]
    wanted, frames, num_decoded = set(metadata.frames_indices), [], 0
    with _open(path) as container:
        try:
            for frame in container.decode(video=0):
                if num_decoded in wanted:
                    frames.append(frame.to_ndarray(format="rgb24"))
                num_decoded += 1
                if len(frames) == len(wanted):
                    break
        except av.FFmpegError:
            # What was decoded before the damage tells whether it was enough.
            pass
    return frames, num_decoded


__all__ = ["paths_as_strings", "read_video"]
