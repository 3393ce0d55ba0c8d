import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import number_image, write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoVideoProcessor, Molmo2VideoProcessor
from transformers.video_utils import VideoMetadata

from hub_upload.tiny import tiny_config, tiny_processor
from modeling_stts import Molmo2SttsVideoProcessor
from modeling_stts.stts_selection import count_pruned_windows


GEOMETRY = {"size": {"height": 54, "width": 54}, "patch_size": 2, "do_rescale": True, "do_normalize": True}


def make(**sampling):
    return Molmo2SttsVideoProcessor(**GEOMETRY, **sampling)


def sampled(processor, videos, **kwargs):
    """The sampled indices of each video, by the metadata and by the pixels."""
    out = processor(videos, return_metadata=True, return_tensors="pt", **kwargs)
    counts = out["video_grids"][:, 0].tolist()
    said = [[int(index) for index in metadata.frames_indices] for metadata in out["video_metadata"]]
    assert [len(indices) for indices in said] == counts
    return said, [part.tolist() for part in numbers_of(out["pixel_values_videos"]).split(counts)]


def numbers_of(patches):
    """The frame numbers that the patches show: stripe by stripe, at the middle of the second patch row."""
    columns = torch.tensor([int((bit + 0.5) * 27 / 8) for bit in range(8)])
    bright = patches[:, 27 + columns].mean(-1) > 0
    return (bright * 2 ** torch.arange(8)).sum(-1)


def frames(num_frames):
    return np.stack([number_image(i) for i in range(num_frames)])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """24 frames at 4 a second: 6 seconds."""
    return write_clip(tmp_path_factory.mktemp("clips") / "a.mp4", 24, fps=4)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "b.mp4", 3, fps=4)


# 24 frames, 4 a second. `num_frames` = n takes every 24 / n-th, but with `max_fps` = 2 (the default) at most 12.
@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"num_frames": 1}, [0]),
        ({"num_frames": 4}, [0, 6, 12, 18]),
        ({"num_frames": 5}, [0, 4, 9, 14, 19]),
        ({"num_frames": 12}, list(range(0, 24, 2))),
        ({"num_frames": 20}, list(range(0, 24, 2))),
        ({"num_frames": 24, "max_fps": 4}, list(range(24))),
        ({"num_frames": 1000, "max_fps": 30}, list(range(24))),
        ({"num_frames": 8, "max_fps": 1}, [0, 4, 8, 12, 16, 20]),
        ({"max_fps": 1}, [0, 4, 8, 12, 16, 20]),
        ({"fps": 1}, [0, 4, 8, 12, 16, 20]),
        ({"fps": 0.5}, [0, 8, 16]),
        ({"fps": 0.01}, [0]),
        ({"fps": 4}, list(range(24))),
        ({"fps": 60.0}, list(range(24))),
        ({}, [0, 3, 6, 9, 12, 15, 18, 21]),
    ],
)
def test_sampled_frames(path, arguments, expected):
    said, seen = sampled(make(num_frames=8), path, **arguments)
    assert said == seen == [expected]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"start": 2}, [8, 10, 12, 14, 16, 18, 20, 22]),
        ({"start": 2, "num_frames": 2}, [8, 16]),
        ({"end": 1, "max_fps": 4}, [0, 1, 2, 3]),
        ({"start": 0.3, "end": 1.1, "max_fps": 4}, [2, 3, 4]),
        ({"start": 1.3, "end": 2.3, "fps": 2}, [6, 8]),
        ({"start": 3, "end": 100, "fps": 1}, [12, 16, 20]),
        ({"start": 5.75}, [23]),
    ],
)
def test_sampled_frames_of_a_part(path, tmp_path, arguments, expected):
    said, seen = sampled(make(num_frames=8), path, **arguments)
    assert said == seen == [expected]
    make(**({} if "fps" in arguments else {"num_frames": 8}) | arguments).save_pretrained(tmp_path)
    assert sampled(Molmo2SttsVideoProcessor.from_pretrained(tmp_path), path)[1] == [expected]
    metadata = [{"total_num_frames": 24, "fps": 4.0}]
    assert sampled(make(num_frames=8), frames(24), video_metadata=metadata, **arguments)[1] == [expected]


def test_only_keyframes(tmp_path):
    encoder = {"gop_size": 5, "x264-params": "scenecut=0"}
    clip = write_clip(tmp_path / "a.mp4", 24, codec="libx264", encoder=encoder)
    for arguments, expected in [
        ({}, [0, 5, 10, 15, 20]),
        ({"num_frames": 2}, [0, 10]),
        ({"max_fps": 0.5}, [0, 5, 15]),
        ({"start": 1, "end": 4}, [5, 10, 15]),
    ]:
        assert sampled(make(num_frames=8), clip, only_keyframes=True, **arguments)[1] == [expected]


def test_a_part_is_found_by_the_presentation_times(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", 6, fps=10, times=[0, 1, 2, 30, 50, 51])
    assert sampled(make(max_fps=100), clip, start=0.2, end=5.1)[1] == [[2, 3, 4]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"start": -1}, "`start` must be a number of seconds that is not negative, got -1"),
        ({"start": float("inf")}, "got inf"),
        ({"end": 0}, "`end` must be a number of seconds after `start`, got start=None and end=0"),
        ({"start": 3, "end": 2}, "got start=3 and end=2"),
        ({"start": 6}, r"a\.mp4: No frame is at or after `start`=6 seconds; the last frame is at 5\.750"),
        ({"start": 0.1, "end": 0.2}, "No frame is at or after `start`=0.1 and before `end`=0.2"),
        ({"start": 1, "end": 1.2, "only_keyframes": True}, "No keyframe is at"),
    ],
)
def test_parts_without_frames_are_refused(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make()(path, **arguments)


def test_what_arrays_do_not_know_is_refused():
    with pytest.raises(ValueError, match="if its `fps` is known"):
        make()(frames(3), start=1)
    with pytest.raises(ValueError, match="`only_keyframes` needs a file"):
        make()(frames(3), only_keyframes=True)


# 24 frames, 4 a second, of 81 windows each; 8 are sampled otherwise.
@pytest.mark.parametrize(
    "arguments, num_frames, num_kept",
    [
        ({"max_video_tokens": 400}, 8, 400),
        ({"max_video_tokens": 400, "prune_ratio": 0.5}, 8, 324),
        ({"max_video_tokens": 1000}, 8, 648),
        ({"max_video_tokens": 100}, 6, 100),
        ({"max_video_tokens": 81}, 5, 81),
        ({"max_video_tokens": 100, "prune_ratio": 0.9}, 8, 81),
        ({"max_video_tokens": 400, "fps": 4}, 24, 400),
        ({"max_video_tokens": 100, "start": 3}, 6, 100),
        ({"frame_scale": 2, "prune_ratio": 0.5}, 16, 324),
        ({"frame_scale": 2, "prune_ratio": 0}, 16, 648),
        ({"frame_scale": 1, "prune_ratio": 0.5}, 8, 324),
        ({"frame_scale": 1.5, "prune_ratio": 0.5, "fps": 2}, 18, 486),
        ({"frame_scale": 9, "prune_ratio": 0.5}, 24, 324),
        ({"frame_scale": 2, "prune_ratio": 0.5, "start": 5}, 4, 81),
        ({"frame_scale": 2, "prune_ratio": 0.5, "max_video_tokens": 200}, 12, 200),
    ],
)
def test_frames_and_ratio_by_the_tokens_that_remain(path, arguments, num_frames, num_kept):
    processor = make(num_frames=8)
    metadata = [{"total_num_frames": 24, "fps": 4.0}]
    for video, known in [(path, {}), (frames(24), {"video_metadata": metadata})]:
        (ratio,) = processor(video, **arguments, **known)["prune_ratio"]
        assert num_frames * 81 - count_pruned_windows(num_frames, 81, ratio) == num_kept
        said, seen = sampled(processor, video, **arguments, **known)
        assert said == seen and len(said[0]) == num_frames
        assert np.ptp(np.diff(said[0])) <= 1


def test_the_tokens_of_every_video_of_a_batch_are_limited(path, short):
    out = make(num_frames=8, max_fps=4)([path, short], max_video_tokens=200, return_tensors="pt")
    assert out["video_grids"][:, 0].tolist() == [8, 3] and "video_metadata" not in out
    kept = [n * 81 - count_pruned_windows(n, 81, ratio) for n, ratio in zip([8, 3], out["prune_ratio"])]
    assert kept == [200, 200]
    with pytest.raises(ValueError, match="`prune_ratio`=0.5 is for the model"):
        make(num_frames=8)(path, prune_ratio=0.5)


def test_more_frames_are_taken_from_arrays_of_no_known_rate_without_a_change_of_their_times():
    times = [
        make(max_fps=2, num_frames=4)(frames(24), return_metadata=True, **more)["video_metadata"][0].timestamps
        for more in ({}, {"frame_scale": 2, "prune_ratio": 0.5})
    ]
    assert times == [[0, 3, 6, 9], [0, 1.5, 3, 4.5, 6, 7.5, 9, 10.5]]


def test_saved_limits_are_used_and_a_call_replaces_them(path, tmp_path):
    make(num_frames=8, max_video_tokens=200, prune_ratio=0.25).save_pretrained(tmp_path)
    processor = Molmo2SttsVideoProcessor.from_pretrained(tmp_path)
    assert processor(path)["prune_ratio"] == [(8 * 81 - 200 + 0.5) / (8 * 81)]
    assert processor(path, max_video_tokens=1000)["prune_ratio"] == [0.25]
    assert "prune_ratio" not in processor(path, max_video_tokens=None)


def test_limits_that_cannot_hold_are_refused(path):
    for arguments, message in [
        ({"max_video_tokens": 80}, "`max_video_tokens` must be at least 81"),
        ({"frame_scale": 2}, "`frame_scale`=2 needs `prune_ratio`"),
        ({"frame_scale": 2, "prune_ratio": 0.5, "do_sample_frames": False}, "needs `do_sample_frames=True`"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()(path, **arguments)


@pytest.mark.parametrize("saved", [{"num_frames": 3}, {"fps": 0.5}, {"max_fps": 1, "num_frames": 4}])
def test_saved_sampling_is_used_and_a_call_replaces_it(path, tmp_path, saved):
    make(**saved).save_pretrained(tmp_path)
    processor = Molmo2SttsVideoProcessor.from_pretrained(tmp_path)
    assert len(sampled(processor, path)[0][0]) == saved.get("num_frames", 3)
    assert sampled(processor, path, num_frames=2)[1] == [[0, 12]]
    assert sampled(processor, path, fps=1)[1] == [[0, 4, 8, 12, 16, 20]]


def test_every_frame_without_sampling(path):
    assert sampled(make(), path, do_sample_frames=False)[1] == [list(range(24))]


def test_a_shorter_video_gives_all_its_frames(short):
    assert sampled(make(max_fps=100), [short], num_frames=64)[1] == [[0, 1, 2]]


@pytest.mark.parametrize("as_type", [str, Path])
def test_paths_alone_in_lists_and_in_nested_lists(path, short, as_type):
    processor, paths = make(max_fps=4), [as_type(path), as_type(short)]
    long, all_three = [0, 6, 12, 18], [0, 1, 2]
    assert sampled(processor, paths[0], num_frames=4)[1] == [long]
    assert sampled(processor, paths, num_frames=4)[1] == [long, all_three]
    assert sampled(processor, [[paths[0]], [], [paths[1]]], num_frames=4)[1] == [long, all_three]


@pytest.mark.parametrize(
    "as_video",
    [
        lambda video: video,
        torch.from_numpy,
        lambda video: torch.from_numpy(video).permute(0, 3, 1, 2),
        list,
        lambda video: [Image.fromarray(frame) for frame in video],
    ],
    ids=["numpy", "torch", "torch, channels first", "list of arrays", "list of images"],
)
def test_frames_as_arrays(as_video):
    videos = [as_video(frames(24)), as_video(frames(5))]
    metadata = [{"total_num_frames": 24, "fps": 4.0}, {"total_num_frames": 5, "fps": 4.0}]
    given = {"video_metadata": metadata, "num_frames": 4}
    assert sampled(make(), videos, **given)[1] == [[0, 6, 12, 18], [0, 2]]
    assert sampled(make(), videos[0], video_metadata=metadata[:1], fps=1)[1] == [[0, 4, 8, 12, 16, 20]]
    assert sampled(make(), [videos[1:]], do_sample_frames=False)[1] == [[0, 1, 2, 3, 4]]


def test_a_folder_of_images(tmp_path):
    for number in range(24):
        Image.fromarray(number_image(number)).save(tmp_path / f"{number}.png")
    assert sampled(make(max_fps=4), tmp_path, num_frames=4)[1] == [[0, 6, 12, 18]]


def test_a_file_and_its_frames_give_the_same(path):
    expected = make()(frames(24), video_metadata=[{"total_num_frames": 24, "fps": 4.0}], return_tensors="pt")
    actual = make()(path, return_tensors="pt")
    for name in ("video_token_pooling", "video_grids"):
        assert torch.equal(actual[name], expected[name])
    assert (actual["pixel_values_videos"] - expected["pixel_values_videos"]).abs().max() < 0.25  # lossy compression


def random_video(num_frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"do_convert_rgb": True},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
        {"size": {"height": 112, "width": 112}, "patch_size": 14, "pooling_size": [3, 2]},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3},
        {"return_tensors": "np"},
    ],
)
@pytest.mark.parametrize("is_channels_first", [False, True])
def test_equals_the_native_processor_on_arrays(arguments, is_channels_first):
    videos = [random_video(24, 45, 80), random_video(3, 120, 66, seed=1)]
    videos = [np.moveaxis(video, -1, 1) for video in videos] if is_channels_first else videos
    given = {"video_metadata": [{"total_num_frames": n, "fps": 4.0} for n in (24, 3)], "return_tensors": "pt"}
    settings = {**GEOMETRY, "num_frames": 11, "max_fps": 4, **arguments}
    expected, actual = (make(videos, **given) for make in (native(settings), ours(settings)))
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype and np.array_equal(actual[name], expected[name])


def native(settings):
    return Molmo2VideoProcessor(**settings)


def ours(settings):
    return Molmo2SttsVideoProcessor(**settings)


def test_equals_the_native_processor_in_every_layout():
    video = torch.from_numpy(random_video(9, 45, 80))
    layouts = [video, video.permute(0, 3, 1, 2), video.permute(0, 3, 1, 2).contiguous(), video.flip(2)]
    for layout in [*layouts, video.float() / 2, list(video.numpy())]:
        for more in ({}, {"input_data_format": "channels_first"}):
            if more and layout[0].shape[0] != 3:
                continue
            given = {"do_sample_frames": False, "return_tensors": "pt", **more}
            expected, actual = (make(layout, **given) for make in (native(GEOMETRY), ours(GEOMETRY)))
            assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_frames_of_full_size_are_never_all_in_float32():
    seen = []

    class Watching(Molmo2SttsVideoProcessor):
        def resize(self, image, *args, **kwargs):
            seen.append(len(image))
            return super().resize(image, *args, **kwargs)

    out = Watching(**GEOMETRY)(random_video(23, 90, 160), do_sample_frames=False, return_tensors="pt")
    assert sum(seen) == len(out["pixel_values_videos"]) == 23 and max(seen) <= 8


def test_the_device_of_a_call_is_where_frames_are_resized(path):
    out = make(num_frames=8)(path, device="meta", return_tensors="pt")
    assert out["pixel_values_videos"].device.type == out["video_token_pooling"].device.type == "meta"
    assert out["pixel_values_videos"].shape == (8, 729, 12)


@settings(max_examples=300, deadline=None)
@given(total=st.integers(1, 5000), num_frames=st.integers(1, 600))
def test_sampling_by_number(total, num_frames):
    metadata = VideoMetadata(total_num_frames=total, fps=1.0, duration=float(total))
    indices = make().sample_frames(metadata, num_frames=num_frames).tolist()
    assert indices[0] == 0 and indices[-1] < total
    assert indices == sorted(set(indices))
    assert len(indices) == min(num_frames, total)


@settings(max_examples=300, deadline=None)
@given(total=st.integers(1, 5000), rate=st.floats(0.1, 240), fps=st.floats(0.01, 300))
def test_sampling_by_rate(total, rate, fps):
    metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
    indices = make().sample_frames(metadata, fps=fps).tolist()
    assert indices[0] == 0 and indices[-1] < total
    assert indices == sorted(set(indices))
    assert len(indices) == min(max(int(total / rate * fps), 1), total)


def test_natively_an_index_past_the_end_can_come():
    """The reason for `sample_frames`; when this fails, the override can go."""
    metadata = VideoMetadata(total_num_frames=17, fps=1.0)
    assert Molmo2VideoProcessor().sample_frames(metadata, num_frames=7).tolist()[-1] == 17
    assert make().sample_frames(metadata, num_frames=7).tolist() == [0, 2, 4, 7, 9, 12, 14]


@pytest.mark.parametrize("name", ["num_frames", "fps", "max_fps"])
@pytest.mark.parametrize("value", [0, -3])
def test_numbers_that_are_not_positive_are_refused(path, name, value):
    message = f"`{name}` must be a positive number, got {value}"
    for video in (path, frames(3)):
        with pytest.raises(ValueError, match=message):
            make()(video, **{name: value})
    with pytest.raises(ValueError, match=message):
        make(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_rate_must_be_a_number(path, value):
    with pytest.raises(ValueError, match=f"`fps` must be a positive number, got {value}"):
        make()(path, fps=value)


def test_number_and_rate_together_are_refused(path):
    message = "Only one of `num_frames` and `fps` may be given, got num_frames=4 and fps=2"
    with pytest.raises(ValueError, match=message):
        make()(path, num_frames=4, fps=2)
    with pytest.raises(ValueError, match=message):
        make(num_frames=4, fps=2)


def test_bad_videos_are_refused(path, tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.mp4 does not exist"):
        make()([path, tmp_path / "nothing.mp4"])
    with pytest.raises(ValueError, match="at least one frame, got 0"):
        make()(np.zeros((0, 64, 64, 3), dtype=np.uint8))
    for mixed in ([path, frames(3)], [frames(3), path]):
        with pytest.raises(ValueError, match="all paths or all frames"):
            make()(mixed)


def test_auto_class_loads_ours(tmp_path):
    tiny_processor(tiny_config()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())["video_processor"]
    assert saved["auto_map"]["AutoVideoProcessor"] == "video_processing_molmo2_stts.Molmo2SttsVideoProcessor"
    processor = AutoVideoProcessor.from_pretrained(tmp_path, num_frames=3)
    assert type(processor) is Molmo2SttsVideoProcessor
    assert (processor.num_frames, processor.max_fps) == (3, 2)


@pytest.mark.parametrize("kind", ["numpy", "torch", "images"])
def test_a_video_of_one_frame_keeps_its_dimensions(kind):
    array = frames(1)
    video = {"numpy": array, "torch": torch.from_numpy(array), "images": [Image.fromarray(array[0])]}[kind]
    assert sampled(make(num_frames=8, do_sample_frames=True), [video]) == ([[0]], [[0]])


def test_max_fps_may_be_a_fraction(path):
    # 6 seconds at half a frame a second: 3 of 24 frames.
    assert sampled(make(), [path], max_fps=0.5)[0] == [[0, 8, 16]]
    assert sampled(make(max_fps=0.5), [path])[0] == [[0, 8, 16]]


def test_fps_at_load_replaces_the_saved_number(tmp_path):
    make(num_frames=8).save_pretrained(tmp_path)
    loaded = Molmo2SttsVideoProcessor.from_pretrained(tmp_path, fps=1)
    assert (loaded.fps, loaded.num_frames) == (1, None)


def test_a_number_at_load_replaces_the_saved_fps(tmp_path):
    make(fps=1).save_pretrained(tmp_path)
    loaded = Molmo2SttsVideoProcessor.from_pretrained(tmp_path, num_frames=8)
    assert (loaded.fps, loaded.num_frames) == (None, 8)
