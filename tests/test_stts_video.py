import functools
import gc
import http.server
import io
import os
import resource
import struct
import sys
import tempfile
import threading
from fractions import Fraction
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from clips import add_stream, number_image, read_numbers, silence, write_audio, write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.video_utils import VideoMetadata

from modeling_stts import stts_video
from modeling_stts.stts_video import as_string, as_strings, read_video


MOVED = {"movflags": "faststart"}


def every(step):
    return lambda metadata: list(range(0, metadata.total_num_frames, step))


def last(metadata):
    return [0, metadata.total_num_frames - 1]


def cut_file(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


@pytest.fixture
def server(tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# Matroska, WebM and MPEG-TS do not say how many frames they have; the packets are counted.
@pytest.mark.parametrize(
    "name, options",
    [
        ("a.mp4", {}),
        ("a.avi", {}),
        ("a.mkv", {}),
        ("a.webm", {"codec": "libvpx"}),
        ("a.ts", {"codec": "mpeg2video", "fps": 25}),
    ],
)
def test_exactly_the_asked_frames_come(tmp_path, name, options):
    path = write_clip(tmp_path / name, 23, **options)
    frames, metadata = read_video(path, every(4))
    assert read_numbers(frames) == metadata.frames_indices == [0, 4, 8, 12, 16, 20]
    assert frames.dtype == np.uint8 and frames.shape == (6, 64, 64, 3)
    assert metadata.total_num_frames == 23


def test_metadata(tmp_path):
    _, metadata = read_video(write_clip(tmp_path / "a.mp4", 10, fps=4), every(5))
    assert metadata.timestamps == [0, 1.25]
    assert dict(metadata) == {
        "total_num_frames": 10,
        "fps": 4.0,
        "width": 64,
        "height": 64,
        "duration": 2.5,
        "video_backend": "pyav",
        "frames_indices": [0, 5],
    }


@pytest.mark.parametrize("name, codec", [("a.mp4", "mpeg4"), ("a.mp4", "libx264"), ("a.mkv", "libx264")])
def test_timestamps_of_a_constant_rate_are_the_native_ones(tmp_path, name, codec):
    clip = write_clip(tmp_path / name, 60, fps=Fraction(30000, 1001), codec=codec, first_pts=9)
    _, metadata = read_video(clip, every(7))
    assert metadata.timestamps == VideoMetadata(**metadata).timestamps


def test_timestamps_of_a_variable_rate_are_those_of_the_file(tmp_path):
    times = [3, 4, 5, 9, 20, 22, 23, 40]
    for name, codec in [("a.mp4", "mpeg4"), ("a.mp4", "libx264"), ("a.gif", "gif")]:
        encoder = {"pix_fmt": "rgb8" if codec == "gif" else "yuv420p"}
        _, metadata = read_video(write_clip(tmp_path / name, 8, 10, codec, times=times, encoder=encoder), every(3))
        assert metadata.timestamps == pytest.approx([0, 0.6, 2])


def test_frames_that_an_edit_list_hides_have_no_time(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 30, codec="libx264", first_pts=-12, avoid_negative_ts="disabled")
    frames, metadata = read_video(path, every(5))
    assert read_numbers(frames) == [12, 17, 22, 27]
    assert metadata.timestamps == [0, 1.25, 2.5, 3.75]


def test_all_frames_without_sampling(tmp_path):
    frames, metadata = read_video(str(write_clip(tmp_path / "a.mp4", 7)))
    assert read_numbers(frames) == metadata.frames_indices == list(range(7))


def test_one_frame(tmp_path):
    frames, metadata = read_video(write_clip(tmp_path / "a.mp4", 1), every(3))
    assert read_numbers(frames) == [0]
    assert metadata.total_num_frames == 1


def test_frames_that_an_edit_list_hides_do_not_count(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 30, first_pts=-12, avoid_negative_ts="disabled")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 30
    frames, metadata = read_video(path, every(5))
    assert (metadata.total_num_frames, metadata.duration) == (18, 4.5)
    assert read_numbers(frames) == [12, 17, 22, 27]


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotated_recordings_are_turned_upright(tmp_path, degrees):
    frames, _ = read_video(write_clip(tmp_path / "a.mp4", 6, rotation=degrees), last)
    upright = np.rot90(number_image(5), degrees // 90)
    assert np.array_equal(frames[1] > 127, upright > 127)


def test_size_follows_the_rotation(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(90)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(number_image(1)[:32], format="rgb24")))
        container.mux(stream.encode())
    frames, metadata = read_video(tmp_path / "a.mp4")
    assert frames.shape == (1, 64, 32, 3)
    assert (metadata.height, metadata.width) == (64, 32)


@pytest.mark.parametrize("ratio, width", [(Fraction(2), 128), (Fraction(12, 11), 70), (Fraction(1, 2), 32)])
def test_pixels_are_made_square(tmp_path, ratio, width):
    with av.open(str(tmp_path / "a.mp4"), mode="w") as container:
        stream = add_stream(container, "libx264")
        stream.codec_context.sample_aspect_ratio = ratio
        container.mux(stream.encode(av.VideoFrame.from_ndarray(number_image(37), format="rgb24")))
        container.mux(stream.encode())
    frames, metadata = read_video(tmp_path / "a.mp4")
    assert frames.shape == (1, 64, width, 3) and (metadata.height, metadata.width) == (64, width)
    assert read_numbers(frames) == [37]


# Without B-frames, because libx265 gives them decoding times at random in clips of one or two frames.
@pytest.mark.parametrize(
    "codec, options", [("libx265", {"x265-params": "log-level=none:bframes=0"}), ("libsvtav1", {"preset": "12"})]
)
def test_ten_bits_become_eight(tmp_path, codec, options):
    levels = np.linspace(0, 255, 16).astype(np.uint8).repeat(4)
    image = np.broadcast_to(levels[None, :, None], (64, 64, 3)).copy()
    with av.open(str(tmp_path / "a.mp4"), mode="w") as container:
        stream = add_stream(container, codec, pix_fmt="yuv420p10le", crf="5", **options)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    frames, _ = read_video(tmp_path / "a.mp4")
    assert np.abs(frames[0].astype(int) - image).max() <= 6


def test_a_size_that_changes_midway(tmp_path):
    for side in (64, 96):
        write_clip(tmp_path / f"{side}.ts", 8, codec="mpeg2video", fps=25, encoder={"side": side})
    (tmp_path / "a.ts").write_bytes((tmp_path / "64.ts").read_bytes() + (tmp_path / "96.ts").read_bytes())
    frames, metadata = read_video(tmp_path / "a.ts")
    assert frames.shape[1:] == (64, 64, 3)
    assert metadata.timestamps == [index / 25 for index in range(len(frames))]  # the file's begin again
    numbers = read_numbers(frames)
    assert (numbers[:7], numbers[-8:]) == (list(range(7)), list(range(8)))


def test_frames_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stts_video, "MAX_PIXELS", 4000)
    for codec in ("mpeg4", "libx264"):
        with pytest.raises(ValueError, match=r"a\.mp4 has frames of 64 x 64 pixels; at most 4000 pixels are read"):
            read_video(write_clip(tmp_path / "a.mp4", 3, codec=codec))


def test_a_gigantic_size_in_the_header_takes_no_memory(tmp_path):
    content = bytearray(write_clip(tmp_path / "a.gif", 6, codec="gif", encoder={"pix_fmt": "rgb8"}).read_bytes())
    content[6:10] = struct.pack("<HH", 16000, 16000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="<BytesIO> has frames of 16000 x 16000 pixels"):
        read_video(io.BytesIO(content))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # a frame of RGB takes 768,000 KiB


def test_times_that_make_no_sense_do_not_make_more_frames(tmp_path):
    frames, metadata = read_video(write_clip(tmp_path / "a.mkv", 4, 10, "libx264", times=[0, 1, 2, 2**45]))
    assert read_numbers(frames) == [0, 1, 2, 3]
    assert metadata.timestamps[:3] == [0, 0.1, 0.2] and metadata.timestamps[3] > 10**12


def test_a_relative_name_with_a_colon_is_a_file(tmp_path, monkeypatch):
    write_clip(tmp_path / "a.mp4", 3).rename(tmp_path / "clip: one.mp4")
    monkeypatch.chdir(tmp_path)
    assert read_numbers(read_video("clip: one.mp4")[0]) == [0, 1, 2]


def test_addresses_are_downloaded(tmp_path, server):
    write_clip(tmp_path / "a.mkv", 6)
    frames, _ = read_video(f"{server}/a.mkv", every(2))
    assert read_numbers(frames) == [0, 2, 4]
    (tmp_path / "empty.mp4").touch()
    for name, message in {"missing.mp4": "404", "empty.mp4": "0 bytes"}.items():
        with pytest.raises(ValueError, match=f"{server}/{name} .*{message}"):
            read_video(f"{server}/{name}")


KINDS = {
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "file": lambda path: path.open("rb"),
    "unbuffered file": lambda path: path.open("rb", buffering=0),
    "memory://": lambda path: in_memory(path),
    "file://": lambda path: path.as_uri(),
}


def in_memory(path):
    fsspec.filesystem("memory").pipe(f"/{path.name}", path.read_bytes())
    return f"memory://{path.name}"


@pytest.mark.parametrize("kind", KINDS)
# Found by seeking; decoded from the start; sampled twice, because it ends early.
@pytest.mark.parametrize(
    "name, codec, share", [("a.mp4", "libx264", 1), ("b.avi", "mpeg4", 1), ("c.mp4", "mpeg4", 0.99)]
)
def test_kinds_of_input(tmp_path, kind, name, codec, share):
    path = cut_file(write_clip(tmp_path / name, 200, codec=codec, **(MOVED if name.endswith("mp4") else {})), share)
    expected, expected_metadata = read_video(path, every(5))
    frames, metadata = read_video(KINDS[kind](path), every(5))
    assert np.array_equal(frames, expected)
    assert (dict(metadata), metadata.timestamps) == (dict(expected_metadata), expected_metadata.timestamps)


@pytest.mark.parametrize("content", [b"", b"hello" * 500, None])
def test_an_open_file_stays_open_at_its_place(tmp_path, content):
    path = write_clip(tmp_path / "a.mp4", 6)
    if content is not None:
        path.write_bytes(content)
    with path.open("rb") as file:
        file.seek(7 if content is None else 0)
        if content is None:
            assert len(read_video(file)[0]) == 6
        else:
            with pytest.raises(ValueError, match=r"a\.mp4 is "):
                read_video(file)
        assert file.read() == path.read_bytes()[7 if content is None else 0 :]


def test_files_that_were_opened_are_closed(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(
        stts_video.fsspec, "open", lambda url, mode: type("", (), {"open": lambda _: opened[-1]})(), raising=True
    )
    for content in (write_clip(tmp_path / "a.mp4", 6).read_bytes(), b"hello" * 500, b""):
        opened.append(io.BytesIO(content))
        try:
            assert len(read_video("memory://a.mp4")[0]) == 6
        except ValueError as error:
            assert str(error).startswith("memory://a.mp4 is ")
        assert opened[-1].closed


def test_files_that_cannot_be_read_are_refused(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 6)
    with path.open("rb") as file:
        pass
    with pytest.raises(ValueError, match=r"a\.mp4 is an open file that cannot be read and sought: .*closed"):
        read_video(file)
    with path.open(encoding="latin-1") as file, pytest.raises(ValueError, match=r'text mode; open it with mode "rb"'):
        read_video(file)
    with open(os.pipe()[0], "rb") as file, pytest.raises(ValueError, match="cannot be read and sought"):
        read_video(file)
    for content, message in {b"": "<0 bytes> is empty", b"hello" * 500: "<2500 bytes> is not a video"}.items():
        with pytest.raises(ValueError, match=message):
            read_video(content)
        with pytest.raises(ValueError, match=message.replace(f"{len(content)} bytes", "BytesIO")):
            read_video(io.BytesIO(content))
    for address in ("memory://nothing.mp4", "nonsense://a.mp4"):
        with pytest.raises(ValueError, match=f"{address} cannot be opened"):
            read_video(address)


def test_a_connection_that_breaks_is_named(tmp_path):
    class Broken(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 2000:
                raise OSError("connection lost")
            return super().read(size)

    with pytest.raises(ValueError, match="connection lost"):
        read_video(Broken(write_clip(tmp_path / "a.mkv", 60).read_bytes()))


def test_an_address_of_the_hub(tmp_path, hub):
    clip = hub.small(write_clip(tmp_path / "a.mp4", 6).read_bytes())
    hub.commit(hub.create("user/clips"), "refs/heads/main", "clips", {"a.mp4": clip})
    frames, _ = read_video("hf://user/clips/a.mp4", every(2))
    assert read_numbers(frames) == [0, 2, 4]
    with pytest.raises(ValueError, match="hf://user/clips/b.mp4 cannot be opened"):
        read_video("hf://user/clips/b.mp4")


def test_an_unreachable_address_is_named():
    with pytest.raises(ValueError, match="http://127.0.0.1:9/a.mp4 cannot be opened"):
        read_video("http://127.0.0.1:9/a.mp4")


@pytest.mark.parametrize("share, real", [(0.985, 196), (0.995, 198)])
def test_a_file_that_ends_a_little_early_is_sampled_again(tmp_path, share, real):
    path = cut_file(write_clip(tmp_path / "a.mp4", 200, **MOVED), share)
    frames, metadata = read_video(path, every(5))
    assert read_numbers(frames)[:-1] == list(range(0, 195, 5))
    _, metadata = read_video(path, last)
    assert abs(metadata.total_num_frames - real) <= 1
    assert metadata.duration == metadata.total_num_frames / 4
    assert metadata.frames_indices == [0, metadata.total_num_frames - 1]


def test_a_truncated_file_is_refused(tmp_path):
    path = cut_file(write_clip(tmp_path / "a.mp4", 200, **MOVED), 0.6)
    with pytest.raises(ValueError, match=r"a\.mp4 should have 200 frames, but only \d+ can be decoded \(truncated"):
        read_video(path, every(5))


def test_a_truncated_file_without_its_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.mp4 is not a video that FFmpeg can read"):
        read_video(cut_file(write_clip(tmp_path / "a.mp4", 50), 0.6))


def test_damaged_frames_are_refused(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 100, codec="libx264", **MOVED)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    content[start:] = bytes(len(content) - start)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.mp4 should have 100 frames, but only 0 can be decoded"):
        read_video(path)


def test_a_directory_or_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is a directory without images"):
        read_video(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}/nothing.mp4 does not exist"):
        read_video(tmp_path / "nothing.mp4")


@pytest.mark.parametrize("suffix", ["png", "JPG", "webp", "bmp"])
def test_a_folder_of_images_is_a_video(tmp_path, suffix):
    for number in range(12):
        Image.fromarray(number_image(number)).save(tmp_path / f"frame{number}.{suffix}")
    (tmp_path / "notes.txt").write_text("not a frame")
    frames, metadata = read_video(tmp_path, every(5))
    assert read_numbers(frames) == metadata.frames_indices == [0, 5, 10]
    assert (metadata.total_num_frames, metadata.fps, metadata.width, metadata.height) == (12, None, 64, 64)


def test_images_of_other_sizes_and_formats_get_the_size_of_the_first(tmp_path):
    rng = np.random.default_rng(0)
    names = ["1.png", "2.jpg", "3.bmp", "4.jpg", "5.webp", "6.png"]
    for number, name in enumerate(names):
        side = 32 + 8 * number
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(tmp_path / name)
    frames, _ = read_video(tmp_path)
    for frame, name in zip(frames, names, strict=True):
        with av.open(str(tmp_path / name)) as container:
            alone = next(container.decode(video=0)).to_ndarray(format="rgb24", width=32, height=32)
        assert np.array_equal(frame, alone), name


def test_a_broken_image_of_a_folder_is_named(tmp_path):
    Image.fromarray(number_image(1)).save(tmp_path / "1.png")
    for content, message in [(b"", "is empty"), (b"no image" * 99, "is not a video that FFmpeg can read")]:
        (tmp_path / "2.png").write_bytes(content)
        with pytest.raises(ValueError, match=rf"2\.png {message}"):
            read_video(tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.mp4", b"", r"a\.mp4 is empty \(0 bytes\)"),
        ("a.mp4", b"hello" * 500, r"a\.mp4 is not a video that FFmpeg can read"),
        ("a.txt", b"hello world\n" * 100, r"a\.txt is a text file"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_video(tmp_path / name)


@pytest.mark.parametrize("cover", [False, True])
def test_sound_without_video_is_refused(tmp_path, cover):
    with pytest.raises(ValueError, match=r"a\.mp4 has no video stream"):
        read_video(write_audio(tmp_path / "a.mp4", cover))


def test_a_video_stream_without_frames_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        sound = container.add_stream("aac", rate=16000)
        container.mux(sound.encode(silence()))
        container.mux(sound.encode())
    with pytest.raises(ValueError, match=r"a\.mkv has a video stream without frames"):
        read_video(tmp_path / "a.mkv")


def test_missing_pyav_is_named(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", 1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        read_video(path)


LAYOUTS = {
    "a.mp4": {"codec": "libx264", **MOVED},
    "b.mp4": {"codec": "libx265", **MOVED, "encoder": {"x265-params": "log-level=none"}},
    "c.mp4": MOVED,
    "d.mkv": {"codec": "libx264"},
    "e.ts": {"codec": "libx264"},
    "f.avi": {},
    "g.gif": {"codec": "gif", "encoder": {"pix_fmt": "rgb8"}},
    "h.webm": {"codec": "libvpx-vp9", "encoder": {"cpu-used": "8"}},
}


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    return {name: write_clip(folder / name, 20, fps=20, **options).read_bytes() for name, options in LAYOUTS.items()}


def read_or_refuse(video):
    """That a file is read, or refused with its name."""
    try:
        frames, metadata = read_video(video, last)
    except ValueError as error:
        assert as_string(video) in str(error)
    else:
        assert len(frames) == len(metadata.timestamps) == 2


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_file_cut_at_any_byte_is_read_or_refused(name, contents, data):
    content = contents[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        read_or_refuse(path)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(name, contents, data):
    content = bytearray(contents[name])
    places = st.integers(0, len(content) - 1) | st.integers(0, min(1500, len(content) - 1))
    for place, value in data.draw(st.lists(st.tuples(places, st.binary(min_size=1, max_size=4)), max_size=8)):
        content[place : place + len(value)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        read_or_refuse(path)


def test_a_codec_that_is_not_known_is_refused(tmp_path, contents):
    path = tmp_path / "a.mkv"
    path.write_bytes(contents["d.mkv"].replace(b"V_MPEG4/ISO/AVC", b"V_MPEG5/ISO/AVC"))
    with pytest.raises(ValueError, match=r"a\.mkv has a video stream in a format that FFmpeg cannot decode"):
        read_video(path)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp", "bmp"])
def test_an_image_with_the_name_of_a_video_is_refused(tmp_path, image_format):
    Image.fromarray(number_image(5)).save(tmp_path / "a.mp4", format=image_format)
    with pytest.raises(ValueError, match=r"a\.mp4 is an image, not a video"):
        read_video(tmp_path / "a.mp4")


def test_a_video_of_one_frame(tmp_path):
    frames, metadata = read_video(write_clip(tmp_path / "a.mp4", 1, codec="libx264"))
    assert read_numbers(frames) == [0] and metadata.total_num_frames == 1


def test_a_wrong_extension_does_not_matter(tmp_path, contents):
    for name, content in contents.items():
        (tmp_path / "a.mp3").write_bytes(content)
        assert read_numbers(read_video(tmp_path / "a.mp3", last)[0]) == [0, 19], name


def test_times_before_zero(tmp_path):
    path = write_clip(tmp_path / "a.mkv", 20, codec="libx264", first_pts=-40, avoid_negative_ts="disabled")
    frames, metadata = read_video(path, every(6))
    assert read_numbers(frames) == metadata.frames_indices
    assert metadata.timestamps == [index / 4 for index in metadata.frames_indices]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_files_and_threads_are_given_back(tmp_path, contents):
    folders = [Path("/proc/self/fd"), Path("/proc/self/task")]
    gc.disable()
    try:
        before = None
        for _ in range(3):
            for name, content in contents.items():
                for share in (1, 0.99, 0.7):
                    (tmp_path / name).write_bytes(content[: int(share * len(content))])
                    read_or_refuse(tmp_path / name)
                    read_or_refuse((tmp_path / name).as_uri())
                    with (tmp_path / name).open("rb") as file:
                        read_or_refuse(file)
            (tmp_path / "bad.mp4").write_bytes(b"hello" * 500)
            for path in (tmp_path / "bad.mp4", write_audio(tmp_path / "sound.mp4")):
                with pytest.raises(ValueError):
                    read_video(path)
            before = before or [len(list(folder.iterdir())) for folder in folders]
        assert [len(list(folder.iterdir())) for folder in folders] == before
    finally:
        gc.enable()


def test_as_strings():
    frames, file = np.zeros((2, 4, 4, 3)), io.BytesIO(b"ab")
    assert as_strings([[Path("a.mp4")], ("b.mp4",), []]) == [["a.mp4"], ["b.mp4"], []]
    assert as_strings(Path("a.mp4")) == "a.mp4"
    assert as_strings(frames) is frames and as_strings(None) is None
    named = as_strings([b"ab", file])
    assert named == as_strings(named) == ["<2 bytes>", "<BytesIO>"]
    assert named[0].content == b"ab" and named[1].content is file
