"""Finds and decodes chosen frames of an open video stream with PyAV. Knows no files and no sampling."""

from collections.abc import Container, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np


# Codecs whose every packet holds exactly one shown frame. In others (VP8, MPEG-4) some packets show nothing, and how
# many of them a skipped part has, is not known.
ONE_FRAME_A_PACKET = frozenset({"av1", "h264", "hevc", "mjpeg", "prores", "vp9"})
# Codecs whose frames say whether any other frame refers to them. In HEVC they only say it for their own layer.
SAYS_WHAT_IS_REFERRED_TO = frozenset({"h264"})


class UnexpectedFrameError(Exception):
    """Decoding from a keyframe did not give the frames that the packets announce."""


class Packets(NamedTuple):
    """
    The packets of a stream in decoding order; times are in units of the stream's time base.

    pts (`np.ndarray` of shape `(num_packets,)`, int64): presentation times; all 0 if some are not known.
    dts (`np.ndarray` of shape `(num_packets,)`, int64): decoding times, or presentation times where they are earlier.
    is_keyframe (`np.ndarray` of shape `(num_packets,)`, bool).
    shown (`np.ndarray` of shape `(num_frames,)`, int64):
        The packets that an edit list does not hide, in order of presentation.
    error (`Exception`, *optional*): what ended the reading too early.
    """

    pts: np.ndarray
    dts: np.ndarray
    is_keyframe: np.ndarray
    shown: np.ndarray
    error: Exception | None

    @property
    def are_ordered(self) -> bool:
        """Whether every packet has a presentation time of its own."""
        return len(np.unique(self.pts)) == len(self.pts)

    def starts(self) -> np.ndarray:
        """
        Where decoding must begin for each frame: at the last keyframe that neither follows it in the file nor is
        presented after it. A frame between the two in an open group of pictures needs the keyframe before.

        Returns:
            `np.ndarray` of shape `(num_frames,)`, int64: packets in decoding order; the first one if there is no
            such keyframe.
        """
        keys = np.flatnonzero(self.is_keyframe)
        # A keyframe that is presented before an earlier one would make the search by time wrong.
        keys = keys[self.pts[keys] >= np.maximum.accumulate(self.pts[keys])]
        by_time = np.searchsorted(self.pts[keys], self.pts[self.shown], side="right")
        by_place = np.searchsorted(keys, self.shown, side="right")
        return np.concatenate([[0], keys])[np.minimum(by_time, by_place)]


def import_av() -> ModuleType:
    """
    Returns PyAV.

    Raises:
        ImportError: if it is not installed.
    """
    # In a `try`, or loading a hub folder would need PyAV even where no video is decoded.
    try:
        import av
    except ImportError as error:
        raise ImportError("Decoding a video file needs PyAV: pip install av") from error
    return av


def read_packets(stream: Any) -> Packets:
    """
    Reads a stream to its end without decoding it.

    Args:
        stream (`av.VideoStream`): of a container from which nothing was read.

    Returns:
        `Packets`: those before the first error.
    """
    rows, error = [], None
    try:
        for packet in stream.container.demux(stream):
            if packet.size > 0:
                rows.append((packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
    except import_av().error.FFmpegError as demux_error:
        # Its traceback would keep the stream and its decoding threads alive.
        error = demux_error.with_traceback(None)
    pts = [row[0] for row in rows]
    if None in pts:
        pts = [0] * len(rows)
    dts = [time if row[1] is None else min(time, row[1]) for time, row in zip(pts, rows)]
    pts, dts = np.array(pts, dtype=np.int64), np.array(dts, dtype=np.int64)
    shown = np.flatnonzero([not row[3] for row in rows])
    shown = shown[np.argsort(pts[shown], kind="stable")]
    return Packets(pts, dts, np.array([row[2] for row in rows], dtype=bool), shown, error)


class SeekingDecoder:
    """
    Decodes frames from the keyframes before them, and checks each one that comes against the packets. What is neither
    asked for nor referred to is left out, where the codec says so.

    Args:
        stream (`av.VideoStream`): of an open container.
        packets (`Packets`): all packets of the stream, with a presentation time each.
    """

    def __init__(self, stream: Any, packets: Packets):
        self.stream = stream
        self.packets = packets
        self.times = packets.pts[packets.shown]
        self.starts = packets.starts()
        self.frames: Iterator[Any] = iter(())
        self.frame: Any = None
        self.num_fed = -1
        self.next_frame = 0
        self.needed: Container[int] = range(len(packets.pts))

    def read(self, indices: list[int]) -> Iterator[Any]:
        """
        Args:
            indices (`list[int]`): ascending frame indices in order of presentation.

        Yields:
            `av.VideoFrame`: each of them.

        Raises:
            UnexpectedFrameError: if other frames come than the packets announce.
            FFmpegError: if the stream cannot be read or decoded.
        """
        if self.stream.codec_context.codec.canonical_name in SAYS_WHAT_IS_REFERRED_TO:
            self.needed = frozenset(self.packets.shown[[0, *indices]].tolist())
        try:
            # A stream may begin with frames that cannot be decoded, which would shift all others.
            self._read_one(0)
            for index in indices:
                yield self._read_one(index)
        finally:
            # It refers to this object, so that the decoder and its threads would live until garbage is collected.
            self.frames = iter(())

    def _read_one(self, index: int) -> Any:
        if self.num_fed < self.starts[index]:
            self.frames = self._decode_from(self.starts[index])
        while self.next_frame <= index:
            self.frame = next(self.frames, None)
            if self.frame is None:
                raise UnexpectedFrameError(f"The stream ends before frame {index}.")
        return self.frame

    def _decode_from(self, start: int) -> Iterator[Any]:
        first_time = self.packets.pts[start] if start else self.times[0]
        self.next_frame = int(np.searchsorted(self.times, first_time))
        self.num_fed = start
        for packet in self._packets_from(start):
            self.stream.codec_context.skip_frame = "DEFAULT" if self.num_fed in self.needed else "NONREF"
            self.num_fed += 1
            for frame in packet.decode():
                if start and frame.pts is not None and frame.pts < first_time:
                    # It leads an open group of pictures, and what it refers to was not decoded.
                    continue
                self._count_up_to(frame)
                yield frame

    def _count_up_to(self, frame: Any) -> None:
        """Raises if it is not the frame that comes next, or next after some that may be left out."""
        for index in range(self.next_frame, len(self.times)):
            if frame.pts == self.times[index] and not frame.is_corrupt:
                self.next_frame = index + 1
                return
            if self.packets.shown[index] in self.needed:
                break
        raise UnexpectedFrameError(f"Frame {self.next_frame} is not what came at {frame.pts}.")

    def _packets_from(self, start: int) -> Iterator[Any]:
        self.stream.container.seek(int(self.packets.dts[start]), stream=self.stream)
        has_begun = False
        for packet in self.stream.container.demux(self.stream):
            has_begun = has_begun or packet.pts == self.packets.pts[start]
            if has_begun:
                yield packet
            elif packet.dts is not None and packet.dts > self.packets.dts[start]:
                raise UnexpectedFrameError(f"Seeking leads past packet {start}.")


class InOrderDecoder:
    """
    Decodes a stream from its start.

    Args:
        stream (`av.VideoStream`): of a container from which nothing was read.

    Attributes:
        times (`list[int | None]`): presentation times of the frames decoded so far, in units of the time base.
        is_complete (`bool`): whether all asked frames came.
        error (`Exception`, *optional*): what ended the decoding too early.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.times: list[int | None] = []
        self.is_complete = False
        self.error: Exception | None = None

    def read(self, indices: list[int]) -> Iterator[Any]:
        """
        Args:
            indices (`list[int]`): ascending frame indices in order of presentation.

        Yields:
            `av.VideoFrame`: each of them, fewer if the stream ends before.
        """
        wanted = set(indices)
        try:
            for index, frame in enumerate(self.stream.container.decode(self.stream)):
                self.times.append(frame.pts)
                if index in wanted:
                    yield frame
                if index == indices[-1]:
                    self.is_complete = True
                    break
        except import_av().error.FFmpegError as error:
            self.error = error.with_traceback(None)


__all__ = ["InOrderDecoder", "ONE_FRAME_A_PACKET", "Packets", "SeekingDecoder", "UnexpectedFrameError"]
__all__ += ["import_av", "read_packets"]
