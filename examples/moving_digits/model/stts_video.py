"""Reads the sampled frames of a video file with PyAV. Knows no video language model."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from io import BytesIO
from typing import Any, Protocol, runtime_checkable

import numpy as np
from huggingface_hub.hf_file_system import fsspec  # which it depends on, and to which it gave `hf://`
from huggingface_hub.utils import httpx
from transformers.video_utils import VideoMetadata

from .stts_decoding import (
    ONE_FRAME_A_PACKET,
    InOrderDecoder,
    Packets,
    SeekingDecoder,
    UnexpectedFrameError,
    import_av,
    read_packets,
)
from .stts_hdr import HLG, PQ, to_sdr


IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Twice an 8K frame. A few bytes of a crafted file can hold a frame that fills the memory.
MAX_PIXELS = 2**26


class TimedVideoMetadata(VideoMetadata):
    """
    Differences from `VideoMetadata`:
    - `timestamps` are presentation times; natively they are `frames_indices / fps` whatever the file says.

    frame_times (`Sequence[float]`):
        When each frame is presented, in seconds after the first one, ascending; up to the last sampled frame at
        least. Empty where the file does not say.
    keyframes (`Sequence[int]`): ascending indices of the frames that can be decoded without others.
    """

    # No fields, so that a dictionary of the metadata is still one that the native classes take.
    frame_times: Sequence[float] = ()
    keyframes: Sequence[int] = ()

    @property
    def timestamps(self) -> list[float]:
        """Timestamps of the sampled frames in seconds after the first frame of the file."""
        if not self.frame_times:
            return super().timestamps
        return [self.frame_times[index] for index in self.frames_indices]


@runtime_checkable
class BinaryFile(Protocol):
    """An open file: what `open(path, "rb")`, `BytesIO` and fsspec return."""

    def read(self, size: int = -1) -> bytes: ...
    def seek(self, offset: int, whence: int = 0) -> int: ...
    def tell(self) -> int: ...


class NamedContent(str):
    """
    What a video is called in messages, as a string: native code takes videos that are given as strings for paths and
    hands them on to be read.

    content (`bytes` or `BinaryFile`): the video itself.
    """

    content: bytes | BinaryFile

    def __new__(cls, name: str, content: bytes | BinaryFile):
        named = super().__new__(cls, name)
        named.content = content
        return named


def read_video(
    video: str | os.PathLike | bytes | BinaryFile, sample_indices_fn: Callable[..., Any] | None = None
) -> tuple[np.ndarray, TimedVideoMetadata]:
    """
    Reads the packets of a file once, then decodes the sampled frames from the keyframes before them.

    Frames count in order of presentation. Where frames cannot be found by the packets' times, the file is decoded from
    its start. A file that ends at most `max(2, 2 %)` frames before its header says so is sampled from its real number
    of frames. Rotated recordings (phones) are turned upright, and pixels are made square. High dynamic range (PQ, HLG)
    becomes ordinary range. All frames get the size of the first sampled one.

    The images of a folder are the frames of a video in the order of their names, numbers in names counted as numbers.
    Their rate is not known.

    Args:
        video (`str`, `os.PathLike`, `bytes` or `BinaryFile`):
            A local file; a folder of images; an address that starts with `http(s)://`, `hf://` or another protocol of
            fsspec; the content of a file; or a file that is open in binary mode and can seek, which stays open, at
            the place where it is.
        sample_indices_fn (`Callable`, *optional*):
            Called as `sample_indices_fn(metadata=metadata)`, returns ascending, unique frame indices in
            `[0, metadata.total_num_frames)`. All frames if not given.

    Returns:
        `tuple`: frames, `np.ndarray` of shape `(num_frames, height, width, 3)`, uint8, RGB; and their
        `TimedVideoMetadata`: `fps` is the average rate in frames per second, `duration` in seconds, `width` and
        `height` in pixels, `frames_indices` as sampled, `timestamps` in seconds after the file's first frame.

    Raises:
        ValueError:
            if it is not a folder of images or a file with a video stream whose sampled frames can all be decoded, or
            the sampling function refuses it.
        ImportError: if PyAV is not installed.
    """
    path = as_string(video)
    if os.path.isdir(path) and _content(path) is None:
        return _read_folder(path, sample_indices_fn)
    with _open_source(path) as source:
        return _read_source(path, source, sample_indices_fn)


def as_string(video: Any) -> str:
    """
    A video as the string by which it is known: a path, an address or `NamedContent`.

    Args:
        video (`str`, `os.PathLike`, `bytes` or `BinaryFile`): see `read_video`. Anything else is returned as it is.
    """
    if isinstance(video, os.PathLike):
        return os.fspath(video)
    if isinstance(video, (bytes, bytearray, memoryview)):
        return NamedContent(f"<{len(video)} bytes>", bytes(video))
    if isinstance(video, BinaryFile):
        name = getattr(video, "name", None)
        return NamedContent(name if isinstance(name, str) else f"<{type(video).__name__}>", video)
    return video


def as_strings(videos: Any) -> Any:
    """Does `as_string` with every video of an input, nested lists included."""
    if isinstance(videos, (list, tuple)):
        return [as_strings(video) for video in videos]
    return as_string(videos)


def _read_source(
    path: str, source: str | BinaryFile, sample_indices_fn: Callable | None
) -> tuple[np.ndarray, TimedVideoMetadata]:
    with _open_stream(path, source) as stream:
        packets = read_packets(stream)
        _check_packets(path, stream, packets)
        if len(packets.shown) == 1 and stream.container.format.name.endswith("_pipe"):
            raise ValueError(f"{path} is an image, not a video; several in a folder are one, or a list of images is.")
        metadata = _metadata(stream, packets)
        indices = _sample(path, metadata, sample_indices_fn)
        if packets.are_ordered and stream.codec_context.codec.canonical_name in ONE_FRAME_A_PACKET:
            try:
                return _stack(path, SeekingDecoder(stream, packets).read(indices), metadata, stream), metadata
            except (UnexpectedFrameError, import_av().error.FFmpegError):
                # Decoding in order gives the frames all the same, or says what is wrong with the file.
                pass
    return _read_in_order(path, source, metadata, sample_indices_fn)


@contextmanager
def _open_source(path: str) -> Iterator[str | BinaryFile]:
    """
    Gives an absolute path (a relative one with a colon would be read as an address) or an open file, which is closed
    afterwards, or set back to its place if it is the caller's.
    """
    if _content(path) is not None or "://" in path:
        with _open_file(path) as file:
            _check_size(path, file.seek(0, os.SEEK_END))
            yield file
    elif not os.path.exists(path):
        raise ValueError(f"{path} does not exist; a video must be a file, a folder of images or an address.")
    else:
        # A device or a pipe has no size.
        _check_size(path, os.path.getsize(path) if os.path.isfile(path) else None)
        yield os.path.abspath(path)


def _open_file(path: str) -> AbstractContextManager[BinaryFile]:
    content = _content(path)
    if content is None:
        return _open_address(path)
    return BytesIO(content) if isinstance(content, bytes) else _keep_place(path, content)


def _content(path: str) -> bytes | BinaryFile | None:
    # Not by its class, of which the processor and the video processor of a hub folder have a copy each.
    return getattr(path, "content", None)


@contextmanager
def _keep_place(path: str, file: BinaryFile) -> Iterator[BinaryFile]:
    try:
        place = file.tell()
        is_binary = isinstance(file.read(0), bytes)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is an open file that cannot be read and sought: {error}") from error
    if not is_binary:
        raise ValueError(f'{path} is a file in text mode; open it with mode "rb".')
    try:
        yield file
    finally:
        file.seek(place)


def _open_address(url: str) -> BinaryFile:
    try:
        if url.startswith(("http://", "https://")):
            return BytesIO(httpx.get(url, follow_redirects=True).raise_for_status().content)
        return fsspec.open(url, mode="rb").open()
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as error:
        raise ValueError(f"{url} cannot be opened: {error}") from error


def _check_size(path: str, size: int | None) -> None:
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes), so it is not a video.")


@contextmanager
def _open_stream(path: str, source: str | BinaryFile) -> Iterator[Any]:
    av = import_av()
    try:
        if not isinstance(source, str):
            source.seek(0)
        with av.open(source, mode="r", metadata_errors="replace") as container:
            yield _video_stream(path, container)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{path} is not a video that FFmpeg can read: {error}") from error


def _video_stream(path: str, container: Any) -> Any:
    # FFmpeg draws plain text files as if they were terminal animations.
    if container.format.name == "tty":
        raise ValueError(f"{path} is a text file, not a video.")
    cover_image = import_av().stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover_image]
    if not streams:
        raise ValueError(f"{path} has no video stream (streams: {[stream.type for stream in container.streams]}).")
    if streams[0].codec_context is None:
        raise ValueError(f"{path} has a video stream in a format that FFmpeg cannot decode.")
    # Before anything is decoded, because a decoder takes the memory for a whole frame. 0 where it is not known.
    _check_num_pixels(path, streams[0].width or 1, streams[0].height or 1)
    streams[0].thread_type = "AUTO"
    return streams[0]


def _check_packets(path: str, stream: Any, packets: Packets) -> None:
    num_frames = len(packets.shown)
    if num_frames == 0 and not stream.frames:
        raise ValueError(f"{path} has a video stream without frames.") from packets.error
    if num_frames == 0 or _expected_num_frames(stream, num_frames) - num_frames > _tolerance(stream.frames):
        raise _too_short(path, stream.frames, num_frames, packets.error)


def _expected_num_frames(stream: Any, num_packets: int) -> int:
    """As many as the header says, unless an edit list hides some of them; else one a packet."""
    if not stream.frames or _is_trimmed(stream):
        return num_packets
    return stream.frames


def _is_trimmed(stream: Any) -> bool:
    """Whether an edit list hides frames that the header counts."""
    if stream.duration is None or not stream.average_rate:
        return False
    shown = stream.duration * stream.time_base * stream.average_rate
    return shown < stream.frames - _tolerance(stream.frames)


def _tolerance(num_frames: int) -> float:
    return max(2, 0.02 * num_frames)


def _too_short(path: str, expected: int, num_decoded: int, error: Exception | None) -> ValueError:
    return ValueError(
        f"{path} should have {expected} frames, but only {num_decoded} can be decoded "
        f"(truncated or damaged?): {error or 'the file ends there'}."
    )


def _metadata(stream: Any, packets: Packets) -> TimedVideoMetadata:
    num_frames = len(packets.shown)
    fps = float(stream.average_rate) if stream.average_rate else None
    metadata = TimedVideoMetadata(
        total_num_frames=num_frames,
        fps=fps,
        duration=num_frames / fps if fps else None,
        width=stream.width,
        height=stream.height,
        video_backend="pyav",
    )
    metadata.keyframes = np.flatnonzero(packets.is_keyframe[packets.shown])
    if packets.are_ordered:
        metadata.frame_times = _frame_times(stream, packets.pts[packets.shown])
    return metadata


def _frame_times(stream: Any, pts: np.ndarray) -> list[float]:
    """Seconds after the first frame, from ascending presentation times in units of the stream's time base."""
    base = stream.time_base
    times = (pts - pts[0]) * base.numerator / base.denominator
    if stream.average_rate:
        constant = np.arange(len(times)) / float(stream.average_rate)
        # Some containers round times, such as Matroska to milliseconds.
        if np.abs(times - constant).max() <= base:
            return constant.tolist()
    return times.tolist()


def _sample(path: str, metadata: TimedVideoMetadata, sample_indices_fn: Callable | None) -> list[int]:
    indices = list(range(metadata.total_num_frames))
    if sample_indices_fn is not None:
        try:
            indices = sample_indices_fn(metadata=metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    metadata.frames_indices = indices
    return [int(index) for index in metadata.frames_indices]


def _read_in_order(
    path: str, source: str | BinaryFile, metadata: TimedVideoMetadata, sample_indices_fn: Callable | None
) -> tuple[np.ndarray, TimedVideoMetadata]:
    with _open_stream(path, source) as stream:
        decoder = InOrderDecoder(stream)
        frames = _decode_in_order(path, decoder, metadata, sample_indices_fn)
        if not decoder.is_complete:
            _check_end(path, stream, decoder, metadata.total_num_frames)
    if not decoder.is_complete:
        metadata.total_num_frames = len(decoder.times)
        metadata.duration = metadata.total_num_frames / metadata.fps if metadata.fps else None
        with _open_stream(path, source) as stream:
            decoder = InOrderDecoder(stream)
            frames = _decode_in_order(path, decoder, metadata, sample_indices_fn)
    if not decoder.is_complete:
        message = f"Frame {len(decoder.times)} of {path} cannot be decoded: {decoder.error}"
        raise ValueError(message) from decoder.error
    return frames, metadata


def _decode_in_order(
    path: str, decoder: InOrderDecoder, metadata: TimedVideoMetadata, sample_indices_fn: Callable | None
) -> np.ndarray:
    indices = _sample(path, metadata, sample_indices_fn)
    frames = _stack(path, decoder.read(indices), metadata, decoder.stream)
    # Joined recordings begin again at an earlier time.
    are_ascending = None not in decoder.times and sorted(set(decoder.times)) == decoder.times != []
    metadata.frame_times = _frame_times(decoder.stream, np.array(decoder.times)) if are_ascending else ()
    return frames


def _check_end(path: str, stream: Any, decoder: InOrderDecoder, num_expected: int) -> None:
    """Raises for a stream that ends too early. Packets that were only counted need not all hold a frame."""
    missing = num_expected - len(decoder.times)
    is_broken = stream.frames or decoder.error is not None
    if not decoder.times or (is_broken and missing > _tolerance(num_expected)):
        raise _too_short(path, num_expected, len(decoder.times), decoder.error) from decoder.error


def _read_folder(path: str, sample_indices_fn: Callable | None) -> tuple[np.ndarray, TimedVideoMetadata]:
    images = sorted((name for name in os.listdir(path) if name.lower().endswith(IMAGE_SUFFIXES)), key=_natural_order)
    if not images:
        raise ValueError(f"{path} is a directory without images ({', '.join(IMAGE_SUFFIXES)}), so it is not a video.")
    metadata = TimedVideoMetadata(total_num_frames=len(images), video_backend="pyav")
    indices = _sample(path, metadata, sample_indices_fn)
    return _stack(path, (_read_image(os.path.join(path, images[index])) for index in indices), metadata), metadata


def _natural_order(name: str) -> list[tuple[bool, int, str]]:
    """Sorts "2.png" before "10.png"."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def _read_image(path: str) -> Any:
    with _open_source(path) as source, _open_stream(path, source) as stream:
        for frame in stream.container.decode(stream):
            return frame
    raise ValueError(f"{path} has no image that can be decoded.")


def _stack(path: str, frames: Iterator[Any], metadata: TimedVideoMetadata, stream: Any = None) -> np.ndarray:
    stacked = np.empty((len(metadata.frames_indices), 0, 0, 3), dtype=np.uint8)
    # One for all frames: `to_ndarray` would set up its threads and tables for each.
    reformatter = import_av().video.reformatter.VideoReformatter()
    for slot, frame in enumerate(frames):
        if slot == 0:
            # The size may change within a stream; all frames get the first one's.
            size = _shown_size(path, frame, stream.sample_aspect_ratio if stream else None)
        image = np.rot90(_to_rgb(reformatter, frame, size, stream), round(frame.rotation / 90))
        if slot == 0:
            stacked = np.empty((len(stacked), *image.shape), dtype=np.uint8)
        stacked[slot] = image
    metadata.height, metadata.width = stacked.shape[1:3]
    return stacked


def _to_rgb(reformatter: Any, frame: Any, size: tuple[int, int], stream: Any) -> np.ndarray:
    transfer = stream.codec_context.color_trc if stream else None
    if transfer not in (PQ, HLG):
        return reformatter.reformat(frame, *size, format="rgb24").to_ndarray()
    return to_sdr(reformatter.reformat(frame, *size, format="rgb48le").to_ndarray(), transfer)


def _shown_size(path: str, frame: Any, pixel_ratio: Fraction | None) -> tuple[int, int]:
    """Width and height of a frame with square pixels, before it is turned upright."""
    width, height = round(frame.width * (pixel_ratio or 1)), frame.height
    _check_num_pixels(path, width, height)
    return width, height


def _check_num_pixels(path: str, width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{path} has frames of {width} x {height} pixels; at most {MAX_PIXELS} pixels are read.")


__all__ = ["TimedVideoMetadata", "as_string", "as_strings", "read_video"]
