import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
from clips import write_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_stts.stts_decoding import InOrderDecoder, SeekingDecoder, UnexpectedFrameError, read_packets
from modeling_stts.stts_video import read_video


QUIET = {"x265-params": "log-level=none"}
CODECS = {
    "h264.mp4": ("libx264", {}),
    "h264.mkv": ("libx264", {}),
    "h264.ts": ("libx264", {}),
    "open_gop.mp4": ("libx264", {"x264-params": "open-gop=1:bframes=3"}),
    "refresh.mp4": ("libx264", {"x264-params": "intra-refresh=1"}),
    "hevc.mp4": ("libx265", QUIET),
    "hevc.mkv": ("libx265", QUIET),
    "vp8.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}),
    "vp9.webm": ("libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8", "row-mt": "0"}),
    "av1.mp4": ("libsvtav1", {"preset": "12"}),
    "mpeg4.mp4": ("mpeg4", {"bf": "2"}),
    "mjpeg.mov": ("mjpeg", {"pix_fmt": "yuvj420p"}),
    "animation.gif": ("gif", {"pix_fmt": "rgb8"}),
}
SEEKABLE = [name for name in CODECS if not name.startswith(("refresh", "vp8", "mpeg4", "animation"))]


def write(path, num_frames, **options):
    codec, encoder = CODECS[path.name]
    return write_clip(path, num_frames, 20, codec, encoder={**encoder, "gop_size": options.pop("gop_size")}, **options)


def decode_all(path):
    """Every frame of a file, RGB, and their presentation times in seconds after the first one."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    times = [float((frame.pts - frames[0].pts) * frame.time_base) for frame in frames]
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), times


def check(path, indices):
    """That the asked frames of a file are bit for bit those of a full decode, with their times."""
    expected, times = decode_all(path)
    indices = sorted({index % len(expected) for index in indices})
    frames, metadata = read_video(path, lambda metadata: indices)
    assert np.array_equal(frames, expected[indices])
    assert np.allclose(metadata.timestamps, np.array(times)[indices], atol=1e-3)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=12, deadline=None)
@given(
    steps=st.lists(st.integers(1, 5), min_size=6, max_size=40) | st.integers(6, 40).map(lambda length: [1] * length),
    first_pts=st.sampled_from([0, 7]),
    gop_size=st.integers(1, 24),
    indices=st.sets(st.integers(0, 39), min_size=1, max_size=5),
)
def test_equals_a_full_decode(name, steps, first_pts, gop_size, indices):
    if name.startswith("hevc"):
        first_pts = 0  # the encoder gives the muxer of short clips wrong decoding times otherwise
    times = (first_pts + np.cumsum(steps) - steps[0]).tolist()
    with tempfile.TemporaryDirectory() as folder:
        check(write(Path(folder) / name, len(steps), times=times, gop_size=gop_size), indices)


def remux(source, target, change=lambda number, packet: packet):
    """Copies a clip packet by packet; `change` returns the changed packet, or None to leave it out."""
    with av.open(str(source)) as old, av.open(str(target), mode="w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size and change(number, packet) is not None:
                packet.stream = stream
                new.mux(packet)
    return target


def flag_all(is_keyframe):
    def change(number, packet):
        packet.is_keyframe = is_keyframe
        return packet

    return change


def leave_out(num_packets):
    return lambda number, packet: packet if number >= num_packets else None


@pytest.mark.parametrize("name", ["h264.mp4", "open_gop.mp4", "hevc.mp4"])
@pytest.mark.parametrize("is_keyframe", [False, True])
@pytest.mark.parametrize("container", ["mkv", "mp4"])
def test_wrong_keyframe_flags(tmp_path, name, is_keyframe, container):
    clip = write(tmp_path / name, 60, gop_size=12)
    check(remux(clip, tmp_path / f"remuxed.{container}", flag_all(is_keyframe)), [0, 13, 30, 47])
    check(tmp_path / f"remuxed.{container}", [31])


@pytest.mark.parametrize("name", ["h264.mp4", "open_gop.mp4", "hevc.mp4"])
@pytest.mark.parametrize("first", [3, 9])
def test_a_recording_that_begins_within_a_group_of_pictures(tmp_path, name, first):
    clip = write(tmp_path / name, 60, gop_size=12)
    with av.open(str(clip)) as container:
        keys = [number for number, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    for begin in (first, keys[1]):
        cut = remux(clip, tmp_path / "cut.mkv", leave_out(begin))
        check(cut, [30])
        check(cut, [0, 5, 44])


@pytest.mark.parametrize("name", SEEKABLE)
def test_frames_are_found_by_seeking(tmp_path, name):
    path = write(tmp_path / name, 100, gop_size=10)
    expected, _ = decode_all(path)
    indices = [0, 1, 28, 29, 55, 99]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoder = SeekingDecoder(stream, read_packets(stream))
        frames = [frame.to_ndarray(format="rgb24") for frame in decoder.read(indices)]
    assert np.array_equal(np.stack(frames), expected[indices])


@pytest.mark.parametrize("name", [name for name in SEEKABLE if name.endswith(("mp4", "mov"))])
def test_what_is_not_needed_is_not_decoded(tmp_path, name):
    path = write(tmp_path / name, 100, gop_size=10)
    expected, _ = decode_all(path)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for position, size in places[26:74]:
        content[position : position + size] = bytes(size)
    path.write_bytes(content)
    indices = [5, 96]
    assert np.array_equal(read_video(path, lambda metadata: indices)[0], expected[indices])


def test_frames_to_which_none_refers_are_left_out(tmp_path):
    path = write(tmp_path / "h264.mp4", 60, gop_size=30)
    expected, _ = decode_all(path)
    content, order = bytearray(path.read_bytes()), np.argsort([packet.pts for packet in packets_of(path)])
    numbers = np.argsort(order).tolist()
    # The second and third bit of the byte behind a unit's length say whether it is referred to.
    spare = [n for n, packet in zip(numbers, packets_of(path)) if n and bytes(packet)[4] >> 5 == 0]
    asked = sorted({0, spare[3], 59, *set(range(1, 59, 7)) - set(spare)})
    for number, packet in zip(numbers, packets_of(path)):
        if number in set(spare) - set(asked):
            content[packet.pos + 5 : packet.pos + packet.size] = bytes(packet.size - 5)
    path.write_bytes(content)
    assert len(spare) > 15 and np.array_equal(read_video(path, lambda metadata: asked)[0], expected[asked])


def packets_of(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def test_a_stream_that_does_not_give_what_its_packets_announce_is_refused(tmp_path):
    path = write(tmp_path / "h264.mkv", 30, gop_size=10)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = read_packets(stream)
        packets.pts[packets.shown[12]] += 1
        with pytest.raises(UnexpectedFrameError, match="is not what came at"):
            list(SeekingDecoder(stream, packets).read([14]))


def test_decoding_in_order_says_where_it_ended(tmp_path):
    path = write(tmp_path / "mpeg4.mp4", 6, gop_size=3)
    for indices, num_frames, is_complete in [([1, 4], 2, True), ([1, 8], 1, False)]:
        with av.open(str(path)) as container:
            decoder = InOrderDecoder(container.streams.video[0])
            assert len(list(decoder.read(indices))) == num_frames
        assert (decoder.is_complete, decoder.error) == (is_complete, None)
        assert len(decoder.times) == min(indices[-1] + 1, 6)
