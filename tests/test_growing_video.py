import os
import threading
import time
import weakref

import av
import numpy as np
import pytest
from clips import number_image, read_numbers, write_audio, write_clip
from growing_video import TimedFrame, in_chunks, read_frames


FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}
FORMATS = [
    ("a.ts", "libx264", {}),
    ("a.mkv", "libx264", {}),
    ("a.mp4", "libx264", FRAGMENTED),
    ("a.ts", "mpeg2video", {}),
]
NUM_FRAMES = 60


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The bytes of 60 frames at 25 a second by container and codec, with B-frames where the codec has them."""
    folder = tmp_path_factory.mktemp("clips")
    return {
        (name, codec): write_clip(folder / name, NUM_FRAMES, fps=25, codec=codec, **options).read_bytes()
        for name, codec, options in FORMATS
    }


def append(path, pieces, delay=0.01):
    for piece in pieces:
        with open(path, "ab") as file:
            file.write(piece)
        time.sleep(delay)


def in_background(function, *args):
    thread = threading.Thread(target=function, args=args)
    thread.start()
    return thread


def numbers(frames):
    return [read_numbers(frame.image[None])[0] for frame in frames]


@pytest.mark.parametrize("name, codec, options", FORMATS)
def test_a_file_that_grows_gives_every_frame(clips, tmp_path, name, codec, options):
    path, data = tmp_path / name, clips[name, codec]
    # The pieces end within packets, and the file does not exist at first.
    step = len(data) // 11
    writer = in_background(append, path, [data[start : start + step] for start in range(0, len(data), step)])
    frames = list(read_frames(path, fps=25, patience=0.5))
    writer.join()
    assert numbers(frames) == list(range(NUM_FRAMES))
    np.testing.assert_allclose([frame.seconds for frame in frames], np.arange(NUM_FRAMES) / 25, atol=2e-3)


@pytest.mark.parametrize("name, codec, options", FORMATS)
def test_frames_come_before_the_file_is_complete(clips, tmp_path, name, codec, options):
    path, data = tmp_path / name, clips[name, codec]
    path.write_bytes(data[: len(data) * 3 // 4])
    frames = read_frames(path, fps=25, patience=5)
    assert numbers([next(frames)]) == [0]
    append(path, [data[len(data) * 3 // 4 :]])
    assert numbers([next(frames) for _ in range(12)]) == list(range(1, 13))
    frames.close()


def test_a_file_that_does_not_come_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.ts did not appear within 0.1 seconds"):
        next(read_frames(tmp_path / "a.ts", fps=1, patience=0.1))


@pytest.mark.parametrize("name, codec, options", FORMATS)
@pytest.mark.parametrize("part", [0.4, 0.63, 0.8, 0.97])
def test_a_damaged_tail_costs_no_frame_before_it(clips, tmp_path, name, codec, options, part):
    data, path = clips[name, codec], tmp_path / name
    whole = int(len(data) * part)
    path.write_bytes(data[:whole])
    seen = numbers(read_frames(path, fps=25, patience=0))
    # Of a group of B-frames that is cut, the frame after them may be there already.
    assert seen == sorted(set(seen)) and seen[:-1] == list(range(len(seen) - 1))
    path.write_bytes(data[:whole] + bytes(range(256)) * 20)
    damaged = numbers(read_frames(path, fps=25, patience=0))
    assert damaged[: len(seen) - 1] == seen[:-1]
    if part > 0.9:
        assert len(seen) >= 50


@pytest.mark.parametrize("name, codec, options", FORMATS)
def test_damaged_bytes_give_fewer_frames_or_one_error(clips, tmp_path, name, codec, options):
    generator, path = np.random.default_rng(0), tmp_path / name
    for num_bytes in (1, 4, 16, 64, 256):
        data = bytearray(clips[name, codec])
        for place in generator.integers(0, len(data), num_bytes):
            data[place] = generator.integers(0, 256)
        path.write_bytes(data)
        try:
            frames = list(read_frames(path, fps=25, patience=0))
        except ValueError as error:
            assert name in str(error)
        else:
            assert 0 < len(frames) <= NUM_FRAMES
            assert [frame.seconds for frame in frames] == sorted(frame.seconds for frame in frames)


def test_a_file_that_becomes_shorter_is_refused(clips, tmp_path):
    path, data = tmp_path / "a.ts", clips["a.ts", "libx264"]
    path.write_bytes(data)
    frames = read_frames(path, fps=25, patience=5)
    next(frames)
    path.write_bytes(data[:100])
    with pytest.raises(ValueError, match=r"a\.ts became shorter while it was read"):
        list(frames)


def write_text(path):
    path.write_text("not a video " * 1000)
    return path


@pytest.mark.parametrize(
    "name, write, message",
    [
        (
            "a.mp4",
            lambda path: write_clip(path, 200, encoder={"side": 256}),
            "write MPEG-TS, Matroska or fragmented MP4",
        ),
        ("a.ts", write_text, "cannot be read as a video that grows"),
        ("a.ts", lambda path: path.write_bytes(b"") or path, "cannot be read as a video that grows"),
        ("a.mkv", write_audio, "has no video stream"),
    ],
)
def test_what_cannot_be_read_while_it_grows_is_refused(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        list(read_frames(tmp_path / name, fps=1, patience=0))


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(tmp_path, fps):
    with pytest.raises(ValueError, match="`fps` must be a positive number, got"):
        next(read_frames(tmp_path / "a.ts", fps=fps, patience=0))


def test_files_are_closed(clips, tmp_path):
    path = tmp_path / "a.ts"
    path.write_bytes(clips["a.ts", "libx264"])
    before = sorted(os.listdir("/proc/self/fd"))
    frames = read_frames(path, fps=25, patience=0)
    next(frames)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    frames.close()
    list(read_frames(path, fps=25, patience=0))
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "fps, expected",
    [(100, range(60)), (25, range(60)), (5, range(0, 60, 5)), (10, [0, 3, 5, 8, 10, 13, 15, 18, 20, 23])],
)
def test_frames_are_sampled_evenly(clips, tmp_path, fps, expected):
    path = tmp_path / "a.ts"
    path.write_bytes(clips["a.ts", "libx264"])
    seen = numbers(read_frames(path, fps=fps, patience=0))
    assert seen[: len(expected)] == list(expected) and len(seen) == -(-60 * min(fps, 25) // 25)


def test_times_that_jump_back_go_on(clips, tmp_path):
    path, data = tmp_path / "a.ts", clips["a.ts", "mpeg2video"]
    path.write_bytes(data + data)
    frames = list(read_frames(path, fps=1000, patience=0))
    seconds = [frame.seconds for frame in frames]
    assert seconds == sorted(seconds) and seconds[0] == 0 and seconds[-1] == pytest.approx(118 / 25, abs=0.1)
    assert numbers(frames)[:58] == list(range(58))


def test_all_frames_get_the_size_of_the_first(tmp_path):
    big, small = (
        write_clip(tmp_path / name, 5, encoder={"side": side}) for name, side in (("a.ts", 64), ("b.ts", 32))
    )
    path = tmp_path / "both.ts"
    path.write_bytes(big.read_bytes() + small.read_bytes())
    frames = list(read_frames(path, fps=100, patience=0))
    assert len(frames) > 5 and {frame.image.shape for frame in frames} == {(64, 64, 3)}


def test_a_long_recording_takes_no_more_memory(tmp_path):
    """Frames are given away one by one: what was read stays nowhere."""
    path = write_clip(tmp_path / "a.ts", 250, fps=25, codec="mpeg2video")
    alive = []
    for frame in read_frames(path, fps=25, patience=0):
        alive = [one for one in alive if one() is not None] + [weakref.ref(frame.image)]
        assert len(alive) <= 2


def test_chunks_hold_the_frames_of_their_seconds():
    seconds = [0, 0.5, 1.9, 2.0, 3.9, 8.0, 9.5]
    chunks = list(in_chunks((TimedFrame(second, number_image(0)) for second in seconds), 2))
    assert [[frame.seconds for frame in chunk] for chunk in chunks] == [[0, 0.5, 1.9], [2.0, 3.9], [8.0, 9.5]]
    assert list(in_chunks(iter([]), 2)) == []


def test_a_chunk_comes_with_the_first_frame_after_it():
    def frames():
        yield TimedFrame(0.0, number_image(0))
        yield TimedFrame(2.0, number_image(1))
        raise AssertionError("a third frame was asked for")

    assert [frame.seconds for frame in next(in_chunks(frames(), 2))] == [0.0]


def test_a_recorder_that_flushes_now_and_then(tmp_path):
    """A real muxer, whose first bytes are not yet a header that can be read."""
    path = tmp_path / "a.mkv"

    def record():
        with av.open(
            str(path), mode="w", container_options={"cluster_time_limit": "200", "flush_packets": "1"}
        ) as container:
            stream = container.add_stream("libx264", rate=25, options={"tune": "zerolatency"})
            stream.width = stream.height = 64
            for number in range(NUM_FRAMES):
                frame = av.VideoFrame.from_ndarray(number_image(number), format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
                time.sleep(0.02)
            container.mux(stream.encode())

    writer = in_background(record)
    frames = list(read_frames(path, fps=25, patience=1))
    writer.join()
    assert numbers(frames) == list(range(NUM_FRAMES))
