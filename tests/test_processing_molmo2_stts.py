import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import write_clip
from inputs import lively_model
from transformers import AutoProcessor

from hub_upload.tiny import tiny_config, tiny_processor
from modeling_stts import Molmo2SttsProcessor, Molmo2SttsVideoProcessor


CODE_FILES = {"processing_molmo2_stts.py", "stts_decoding.py", "stts_video.py", "video_processing_molmo2_stts.py"}
FRAME = re.compile(r"(\d+\.\d) <frame_start>((?:<im_patch>)*)<frame_end>")
PIXELS = ("pixel_values_videos", "video_token_pooling", "video_grids")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_config())


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """24 frames at 4 a second (6 seconds), and 6 frames at 2 a second (3 seconds)."""
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / "a.mp4", 24, fps=4), write_clip(folder / "b.mkv", 6, fps=2)]


def question(video, text="What happens?"):
    return [{"role": "user", "content": [{"type": "video", "path": video}, {"type": "text", "text": text}]}]


def encode(processor, chats, **processor_kwargs):
    return processor.apply_chat_template(
        chats,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )


def shown_times(processor, input_ids):
    """The timestamps in a prompt; each must be followed by one frame's 81 tokens."""
    found = FRAME.findall(processor.decode(input_ids))
    assert all(patches == "<im_patch>" * 81 for _, patches in found)
    return [float(time) for time, _ in found]


# Frame i of the first clip is at i / 4 seconds, and the saved settings are 8 frames and at most 2 a second.
@pytest.mark.parametrize(
    "arguments, indices",
    [
        ({}, [0, 3, 6, 9, 12, 15, 18, 21]),
        ({"num_frames": 3}, [0, 8, 16]),
        ({"fps": 1}, [0, 4, 8, 12, 16, 20]),
        ({"max_fps": 1}, [0, 4, 8, 12, 16, 20]),
        ({"num_frames": 16, "max_fps": 4}, [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22]),
    ],
)
@pytest.mark.parametrize("as_type", [str, Path])
def test_timestamps_are_the_times_of_the_sampled_frames(processor, clips, arguments, indices, as_type):
    inputs = encode(processor, question(as_type(clips[0])), **arguments)
    times = shown_times(processor, inputs["input_ids"][0])
    assert times == [float(f"{index / 4:.1f}") for index in indices]
    assert inputs["video_grids"].tolist() == [[len(indices), 9, 9]]
    assert inputs["pixel_values_videos"].shape == (len(indices), 729, 12)


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.mp4", "mpeg4")])
def test_timestamps_of_a_variable_frame_rate(processor, tmp_path, name, codec):
    clip = write_clip(tmp_path / name, 6, fps=10, codec=codec, times=[5, 6, 7, 30, 50, 51])
    times = shown_times(processor, encode(processor, question(clip), num_frames=3, max_fps=100)["input_ids"][0])
    assert times == [0, 0.2, 4.5]


def test_bytes_and_open_files_are_read_as_their_paths_are(processor, clips):
    expected = encode(processor, [question(clip) for clip in clips])
    with clips[1].open("rb") as file:
        for videos in [[clips[0].read_bytes(), file], [io.BytesIO(clips[0].read_bytes()), str(clips[1])]]:
            actual = encode(processor, [question(video) for video in videos])
            assert all(torch.equal(actual[name], expected[name]) for name in expected)
        assert file.read() == clips[1].read_bytes()


def test_by_hand_the_model_takes_the_ratios_of_the_processor(processor, clips):
    model, chats = lively_model(prune_ratio=0.25), [question(clip) for clip in clips]
    ratio = model.config.stts_config.prune_ratio
    for asked, counts, kept in [
        ({"max_video_tokens": 300}, [8, 6], [300, 300]),
        ({"max_video_tokens": 81}, [5, 5], [81, 81]),
        ({"frame_scale": 2, "max_fps": 1}, [12, 6], [365, 183]),
    ]:
        inputs = encode(processor, chats, prune_ratio=ratio, **asked).to(dtype=torch.bfloat16)
        assert inputs["video_grids"][:, 0].tolist() == counts
        pixels = {name: inputs[name] for name in PIXELS}
        pixels["pixel_values_videos"] = pixels["pixel_values_videos"].float()
        with torch.no_grad():
            features = model.get_video_features(**pixels, prune_ratio=inputs["prune_ratio"]).pooler_output
        assert [len(video) for video in features] == kept
        inputs["pixel_values_videos"] = pixels["pixel_values_videos"]
        out = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        cut = inputs["input_ids"].shape[1] - max(
            inputs["attention_mask"].sum(1) - torch.tensor(counts) * 81 + torch.tensor(kept)
        )
        assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] - cut


def test_timestamps_of_arrays_are_native(processor):
    video, metadata = np.zeros((4, 54, 54, 3), dtype=np.uint8), [{"total_num_frames": 4, "fps": 2.0}]
    inputs = processor(text="<|video|>", videos=[video], video_metadata=metadata, return_tensors="pt")
    assert shown_times(processor, inputs["input_ids"][0]) == [0, 0.5, 1, 1.5]


def test_saved_sampling_is_used(clips, tmp_path):
    saved = tiny_processor(tiny_config())
    saved.video_processor = Molmo2SttsVideoProcessor.from_dict(saved.video_processor.to_dict(), num_frames=2)
    saved.save_pretrained(tmp_path)
    processor = Molmo2SttsProcessor.from_pretrained(tmp_path)
    assert shown_times(processor, encode(processor, question(clips[0]))["input_ids"][0]) == [0, 3]


def test_batch_of_different_lengths_is_padded_on_the_left(processor, clips):
    chats = [question(clips[0]), question(clips[1], "Why?")]
    batch = encode(processor, chats)
    assert batch["video_grids"][:, 0].tolist() == [8, 6]
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths[1] < lengths[0] == batch["input_ids"].shape[1]
    first_frame = 0
    for row, chat in enumerate(chats):
        alone = encode(processor, chat)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            assert torch.equal(batch[name][row, -lengths[row] :], alone[name][0])
            assert (batch["attention_mask"][row, : -lengths[row]] == 0).all()
        frames = slice(first_frame, first_frame + len(alone["pixel_values_videos"]))
        assert torch.equal(batch["pixel_values_videos"][frames], alone["pixel_values_videos"])
        first_frame = frames.stop


def test_left_padding_does_not_depend_on_the_tokenizer_and_a_call_can_change_it(clips):
    processor = tiny_processor(tiny_config())
    processor.tokenizer.padding_side = processor.tokenizer.init_kwargs["padding_side"] = "right"
    chats = [question(clips[0]), question(clips[1])]
    assert encode(processor, chats)["attention_mask"][1, 0] == 0
    for asked in ({"padding_side": "right"}, {"text_kwargs": {"padding_side": "right"}}):
        mask = encode(processor, chats, **asked)["attention_mask"]
        assert mask[1, 0] == 1 and mask[1, -1] == 0


def test_a_batch_with_and_without_videos(processor, clips):
    chats = [[{"role": "user", "content": "Hi"}], question(clips[1])]
    batch = encode(processor, chats)
    assert (batch["mm_token_type_ids"].sum(1) > 0).tolist() == [False, True]
    assert batch["video_grids"].tolist() == [[6, 9, 9]]


def test_text_and_images_go_through(processor):
    image = torch.zeros(3, 54, 54, dtype=torch.uint8)
    inputs = processor(text="<|image|> What?", images=[image], return_tensors="pt")
    assert "pixel_values" in inputs and "pixel_values_videos" not in inputs
    assert not set(PIXELS) & processor(text="What?", return_tensors="pt").keys()


def test_several_images_in_one_chat(processor):
    image = {"type": "image", "image": np.zeros((54, 54, 3), dtype=np.uint8)}
    inputs = encode(processor, [{"role": "user", "content": [image, {"type": "text", "text": "or"}, image]}])
    assert len(inputs["image_grids"]) == 2


@pytest.mark.parametrize("in_one_chat", [True, False])
def test_images_beside_videos_are_refused_before_anything_is_decoded(processor, tmp_path, in_one_chat):
    image = {"type": "image", "image": np.zeros((54, 54, 3), dtype=np.uint8)}
    video = {"type": "video", "path": str(tmp_path / "does_not_exist.mp4")}
    parts = [[image, video]] if in_one_chat else [[image], [video]]
    with pytest.raises(ValueError, match="takes images or videos in one call, not both"):
        encode(processor, [[{"role": "user", "content": content}] for content in parts])


@pytest.mark.parametrize("in_one_turn", [True, False])
def test_several_videos_in_one_chat_are_refused_before_anything_is_decoded(processor, tmp_path, in_one_turn):
    video = {"type": "video", "path": str(tmp_path / "does_not_exist.mp4")}
    turns = [[video, video]] if in_one_turn else [[video], [video]]
    with pytest.raises(ValueError, match="Prompt 0 has 2 .* At most one video is supported per sample"):
        encode(processor, [{"role": "user", "content": content} for content in turns])


def test_frames_in_a_chat(processor):
    frames = np.zeros((5, 60, 40, 3), dtype=np.uint8)
    chat = [{"role": "user", "content": [{"type": "video", "video": frames}]}]
    inputs = encode(processor, chat, do_sample_frames=False)
    assert inputs["video_grids"].tolist() == [[5, 9, 9]]


@pytest.mark.parametrize(
    "text, rows, message",
    [
        ("What?", [0], r"The prompts have 0 <\|video\|> placeholders, but 1 videos"),
        ("<|video|> What?", None, r"The prompts have 1 <\|video\|> placeholders, but 0 videos"),
        ("<|video|> What?", [0, 1], r"The prompts have 1 <\|video\|> placeholders, but 2 videos"),
        ("<|video|><|video|>", [0, 1], r"Prompt 0 has 2 <\|video\|> placeholders. At most one video is supported"),
        (["<|video|> What?", "Hi"], [[], [0]], r"Prompt 0 has 1 <\|video\|> placeholders, but 0 videos"),
        (["<|video|> What?", "Hi"], [[0, 1], []], r"Prompt 0 has 1 <\|video\|> placeholders, but 2 videos"),
    ],
)
def test_prompts_and_videos_that_do_not_fit_are_refused(processor, clips, text, rows, message):
    def pick(rows):
        return [pick(row) if isinstance(row, list) else clips[row] for row in rows]

    with pytest.raises(ValueError, match=message):
        processor(text=text, videos=rows and pick(rows), return_tensors="pt")


@pytest.mark.parametrize("videos", [[], [[], []], ([], [])])
def test_empty_lists_are_no_videos(processor, videos):
    inputs = processor(text=["Hi", "What?"], videos=videos, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], processor(text=["Hi", "What?"], return_tensors="pt")["input_ids"])
    with pytest.raises(ValueError, match=r"The prompts have 1 <\|video\|> placeholders, but 0 videos"):
        processor(text=["<|video|>Hi", "What?"], videos=videos, return_tensors="pt")


def test_a_chat_with_a_bad_video_is_refused(processor, clips, tmp_path):
    (tmp_path / "notes.mp4").write_text("not a video " * 100)
    with pytest.raises(ValueError, match=r"notes\.mp4 is not a video"):
        encode(processor, question(tmp_path / "notes.mp4"))
    with pytest.raises(ValueError, match="`num_frames` must be a positive number, got 0"):
        encode(processor, question(clips[0]), num_frames=0)


def test_saved_with_its_code(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_molmo2_stts.Molmo2SttsProcessor"}
    auto_map = saved["video_processor"]["auto_map"]
    assert auto_map["AutoVideoProcessor"] == "video_processing_molmo2_stts.Molmo2SttsVideoProcessor"
    assert CODE_FILES <= {path.name for path in tmp_path.iterdir()}


def test_installed_package_loads_ours_and_again_after_saving(processor, clips, tmp_path):
    expected = encode(processor, question(clips[0]))
    for step in ("first", "second"):
        processor.save_pretrained(tmp_path / step)
        processor = AutoProcessor.from_pretrained(tmp_path / step)
        assert type(processor) is Molmo2SttsProcessor
        assert type(processor.video_processor) is Molmo2SttsVideoProcessor
        actual = encode(processor, question(clips[0]))
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_several_videos_for_one_placeholder_are_refused(processor, clips):
    with pytest.raises(ValueError, match=r"Prompt 0 has 1 <\|video\|> placeholders, but 2 videos"):
        encode(processor, question([str(clip) for clip in clips]))
