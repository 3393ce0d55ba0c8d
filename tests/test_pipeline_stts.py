import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import number_image, write_clip
from inputs import lively_model
from PIL import Image
from transformers import pipeline

from hub_upload.tiny import tiny_config, tiny_processor
from modeling_stts import Molmo2SttsForConditionalGeneration, Molmo2SttsProcessor, VideoTextToTextPipeline


GREEDY = {"max_new_tokens": 4, "generate_kwargs": {"do_sample": False}}


@pytest.fixture(scope="module")
def model():
    model = lively_model()
    # The first 94 tokens are the printable ASCII characters; others would all be decoded to the same sign.
    model.generation_config.suppress_tokens = list(range(94, model.config.text_config.vocab_size))
    return model


@pytest.fixture
def pipe(model):
    return make(model, batch_size=8)


@pytest.fixture
def calls(model, monkeypatch):
    """The arguments of each `generate` that the pipeline calls; it answers "ok" without running the model."""
    recorded = []

    def generate(input_ids, **kwargs):
        recorded.append({"input_ids": input_ids, **kwargs})
        answer = torch.tensor(tiny_processor(tiny_config()).tokenizer("ok").input_ids)
        return torch.cat([input_ids, answer.expand(len(input_ids), -1)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    return recorded


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [str(write_clip(folder / f"{n}.mp4", n, fps=2)) for n in (3, 6, 4)]


def make(model, **kwargs):
    processor = tiny_processor(tiny_config())
    return VideoTextToTextPipeline(model=model, processor=processor, task="video-text-to-text", device="cpu", **kwargs)


def question(video, text="What happens?"):
    return [{"role": "user", "content": [{"type": "video", "path": video}, {"type": "text", "text": text}]}]


def expected_answer(pipe, video, text="What happens?", prune_ratio=None, **sampling):
    """The answer without the pipeline."""
    inputs = pipe.processor.apply_chat_template(
        question(video, text),
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=sampling,
    )
    ratio = {} if prune_ratio is None else {"prune_ratio": prune_ratio}
    tokens = pipe.model.generate(**inputs, max_new_tokens=4, do_sample=False, **ratio)
    return pipe.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def frames(num_frames):
    return np.stack([number_image(i) for i in range(num_frames)])


def test_one_video_and_text(pipe, clips):
    answers = pipe(clips[0], text="What happens?", **GREEDY)
    assert answers == [{"input_text": "What happens?", "generated_text": expected_answer(pipe, clips[0])}]


@pytest.mark.parametrize("as_type", [str, Path])
def test_kinds_of_paths(pipe, calls, clips, as_type):
    for answers in (pipe(as_type(clips[0]), text="Hi"), pipe(videos=as_type(clips[0]), text="Hi")):
        assert answers == [{"input_text": "Hi", "generated_text": "ok"}]
        assert calls[-1]["video_grids"].tolist() == [[3, 9, 9]]


def test_bytes_and_open_files(pipe, calls, clips):
    path = Path(clips[0])
    for _ in range(2):
        pipe(path.read_bytes(), text="Hi")
        assert calls[-1]["video_grids"].tolist() == [[3, 9, 9]]
    with path.open("rb") as file:
        pipe([file, Path(clips[1]).read_bytes()], text="Hi")
        pipe(question(file))
    assert [call["video_grids"][:, 0].tolist() for call in calls[2:]] == [[3, 6], [3]]


@pytest.mark.parametrize(
    "as_video",
    [
        lambda video: video,
        torch.from_numpy,
        lambda video: [Image.fromarray(frame) for frame in video],
    ],
    ids=["numpy", "torch", "list of images"],
)
def test_frames_as_video(pipe, calls, as_video):
    kwargs = {**GREEDY, "processor_kwargs": {"do_sample_frames": False}}
    one = pipe(as_video(frames(3)), text="Hi", **kwargs)
    assert list(one[0]) == ["input_text", "generated_text"]
    assert calls[-1]["video_grids"][:, 0].tolist() == [3]
    two = pipe([as_video(frames(3)), as_video(frames(2))], text="Hi", **kwargs)
    assert calls[-1]["video_grids"][:, 0].tolist() == [3, 2]
    assert two[0] == one


def test_an_array_with_five_dimensions_is_a_list_of_videos(pipe, calls):
    answers = pipe(np.stack([frames(2)] * 3), text="Hi", **GREEDY)
    assert len(answers) == 3 and len(calls) == 1


def test_a_list_answers_like_single_videos(pipe, clips):
    texts = ["What happens?", "Why?", "Who is there?"]
    answers = pipe(clips, text=texts, **GREEDY)
    for clip, text, answer in zip(clips, texts, answers):
        assert answer == [{"input_text": text, "generated_text": expected_answer(pipe, clip, text)}]


def test_a_list_is_one_call_padded_on_the_left(pipe, calls, clips):
    answers = pipe(clips, text="Hi", **GREEDY)
    assert answers == [[{"input_text": "Hi", "generated_text": "ok"}]] * 3
    assert len(calls) == 1
    mask = calls[0]["attention_mask"]
    assert mask.shape[0] == 3 and mask[:, -1].all() and mask[:, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("batch_size, sizes", [(1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (8, [3])])
def test_batch_size(model, pipe, calls, clips, batch_size, sizes):
    expected = pipe(clips, text="Hi", **GREEDY)
    for asked in (pipe, make(model, batch_size=batch_size)):
        calls.clear()
        given = {"batch_size": batch_size} if asked is pipe else {}
        assert asked(clips, text="Hi", **given, **GREEDY) == expected
        assert [len(call["input_ids"]) for call in calls] == sizes


def test_one_item_at_a_time_by_default(model, calls, clips):
    make(model)(clips, text="Hi", **GREEDY)
    assert [len(call["input_ids"]) for call in calls] == [1, 1, 1]


def test_chats(pipe, clips):
    chat = question(clips[0])
    reply = {"role": "assistant", "content": expected_answer(pipe, clips[0])}
    assert pipe(chat, **GREEDY) == [{"input_text": chat, "generated_text": [*chat, reply]}]


def test_lists_of_chats(pipe, calls, clips):
    chats = [question(clip) for clip in clips]
    reply = {"role": "assistant", "content": "ok"}
    expected = [[{"input_text": chat, "generated_text": [*chat, reply]}] for chat in chats]
    assert pipe(chats) == pipe(text=chats) == expected
    assert [len(call["input_ids"]) for call in calls] == [3, 3]
    assert pipe(text=chats[0]) == expected[0]


def test_a_chat_that_ends_in_an_answer_is_continued(pipe, clips):
    begun = {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}
    chat = [*question(clips[0]), begun]
    last = pipe(chat, **GREEDY)[0]["generated_text"][-1]
    assert last["role"] == "assistant" and last["content"][0]["text"].startswith("It is")
    with pytest.raises(ValueError, match="either all chats or none"):
        pipe([chat, question(clips[1])], **GREEDY)


def test_text_only(pipe, calls):
    answers = pipe(text=["Hi", "Hello there"], **GREEDY)
    assert [answer[0]["input_text"] for answer in answers] == ["Hi", "Hello there"]
    assert "pixel_values_videos" not in calls[0]
    assert pipe(text="Hi", **GREEDY) == answers[0]


def test_full_text(pipe, clips):
    new = pipe(clips[0], text="Hi", **GREEDY)[0]["generated_text"]
    assert pipe(clips[0], text="Hi", return_full_text=True, **GREEDY)[0]["generated_text"] == "Hi" + new
    chat = question(clips[0], "Hi")
    assert pipe(chat, return_full_text=False, **GREEDY)[0]["generated_text"] == new
    tokens = pipe(chat, return_tensors=True, **GREEDY)[0]["generated_token_ids"]
    assert pipe.processor.decode(tokens, skip_special_tokens=True).endswith(new)


def test_prune_ratio_is_passed_on_only_when_given(pipe, calls, clips):
    for ratio in (None, 0, 0.8):
        pipe(clips[1], text="Hi", prune_ratio=ratio, **GREEDY)
    assert [call.get("prune_ratio", "not given") for call in calls] == ["not given", 0, 0.8]


def test_prune_ratio_has_its_effect(pipe, clips):
    answers = [pipe(clips[1], text="Hi", prune_ratio=ratio, **GREEDY)[0]["generated_text"] for ratio in (0, 0.8)]
    assert answers == [expected_answer(pipe, clips[1], "Hi", prune_ratio=ratio) for ratio in (0, 0.8)]
    assert answers[0] != answers[1]


def test_sampling_is_passed_on(pipe, calls, clips):
    for sampling, num_frames in [({"num_frames": 2}, 2), ({"fps": 1}, 3), ({"max_fps": 1}, 3), ({}, 6)]:
        pipe(clips[1], text="Hi", **sampling, **GREEDY)
        assert calls[-1]["video_grids"][0, 0] == num_frames
    for sampling, num_frames in [({"start": 1, "end": 2}, 2), ({"only_keyframes": True}, 2)]:
        pipe(clips[1], text="Hi", **sampling, **GREEDY)
        assert calls[-1]["video_grids"][0, 0] == num_frames
    with pytest.raises(ValueError, match="got num_frames=2 and fps=1"):
        pipe(clips[1], text="Hi", num_frames=2, fps=1)


def test_tokens_that_remain(pipe, calls, clips):
    pipe(clips, text="Hi", max_video_tokens=162, **GREEDY)
    assert calls[-1]["video_grids"][:, 0].tolist() == [3, 6, 4]
    assert calls[-1]["prune_ratio"] == [0.5, (4 * 81 + 0.5) / (6 * 81), 0.5]
    pipe(clips[1], text="Hi", frame_scale=2, num_frames=3, prune_ratio=0.2, **GREEDY)
    assert calls[-1]["video_grids"][:, 0].tolist() == [6]
    assert calls[-1]["prune_ratio"] == [(6 * 81 - (243 - 48) + 0.5) / (6 * 81)]
    pipe(clips[1], text="Hi", processor_kwargs={"videos_kwargs": {"max_video_tokens": 400}}, **GREEDY)
    assert calls[-1]["prune_ratio"] == [0.5]
    pipe(text="Hi", max_video_tokens=162, **GREEDY)
    assert "prune_ratio" not in calls[-1]
    pipe.processor.video_processor.max_video_tokens = 162
    pipe(clips[1], text="Hi", prune_ratio=0.8, **GREEDY)
    assert calls[-1]["prune_ratio"] == [0.8]
    with pytest.raises(ValueError, match="`max_video_tokens` must be at least 81"):
        pipe(clips[1], text="Hi", max_video_tokens=7)


def test_tokens_that_remain_have_their_effect(pipe, clips):
    answer = pipe(clips[1], text="Hi", max_video_tokens=200, **GREEDY)[0]["generated_text"]
    ratio = (6 * 81 - 200 + 0.5) / (6 * 81)
    assert answer == expected_answer(pipe, clips[1], "Hi", prune_ratio=ratio)


def test_tokens_that_cannot_be_counted_beforehand_are_refused(pipe, clips, monkeypatch):
    monkeypatch.setattr(pipe.model.config.stts_config, "prune_from_frame", 2)
    with pytest.raises(ValueError, match=r"'max_video_tokens': 200} needs a model with `prune_from_frame`=0"):
        pipe(clips[1], text="Hi", max_video_tokens=200)


def test_what_the_pipeline_was_made_with_is_kept_and_a_call_replaces_it(model, calls, clips):
    pipe = make(
        model, prune_ratio=0.8, num_frames=2, max_new_tokens=3, return_full_text=True, generate_kwargs={"num_beams": 2}
    )
    answer = pipe(clips[1], text="Hi")
    assert answer[0]["generated_text"].startswith("Hi")
    assert (calls[0]["prune_ratio"], calls[0]["num_beams"], calls[0]["max_new_tokens"]) == (0.8, 2, 3)
    assert calls[0]["video_grids"][0, 0] == 2
    pipe(clips[1], text="Hi", prune_ratio=0.1, fps=1, max_new_tokens=1)
    assert (calls[1]["prune_ratio"], calls[1]["max_new_tokens"]) == (0.1, 1)
    assert calls[1]["video_grids"][0, 0] == 3


def test_generation_settings(pipe, calls, clips):
    settings = {"do_sample": False, "min_new_tokens": 2}
    pipe(clips[0], text="Hi", max_new_tokens=2, generate_kwargs=settings)
    pipe(clips[0], text="Hi", max_new_tokens=2, generate_kwargs=settings)  # it is not written into
    pipe(clips[0], text="Hi", max_new_tokens=2, **settings)
    assert settings == {"do_sample": False, "min_new_tokens": 2}
    for call in calls:
        assert (call["max_new_tokens"], call["min_new_tokens"], call["do_sample"]) == (2, 2, False)


def test_several_answers_for_each_question(pipe, clips):
    settings = {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    answers = pipe(clips[:2], text=["Hi", "Why?"], max_new_tokens=3, generate_kwargs=settings)
    assert [[record["input_text"] for record in answer] for answer in answers] == [["Hi"] * 2, ["Why?"] * 2]
    assert len(pipe(clips[0], text="Hi", max_new_tokens=3, generate_kwargs=settings)) == 2


def test_without_a_chat_template_the_placeholder_goes_first(pipe, calls, clips):
    pipe.processor.chat_template = None
    answers = pipe(clips[:2], text="What happens?", **GREEDY)
    assert [answer[0]["input_text"] for answer in answers] == ["What happens?"] * 2
    prompt = pipe.processor.decode(calls[0]["input_ids"][1])
    assert prompt.startswith("<|im_end|>0.0 <frame_start>") and prompt.endswith("<frame_end>What happens?")


@pytest.mark.parametrize(
    "videos, text, message",
    [
        ("a.mp4", None, "`text` must be"),
        (None, None, "`text` must be"),
        ("a.mp4", ["Hi", 3], "`text` must be"),
        ("a.mp4", ["Hi", "Ho"], "1 video and 2 texts"),
        (["a.mp4", "b.mp4"], ["Hi"], "2 videos and 1 texts"),
        ([], "Hi", "0 videos and 0 texts"),
        ("a.mp4", question("a.mp4"), "belong into their messages"),
        (question("a.mp4"), "Hi", "belong into their messages"),
    ],
)
def test_videos_and_texts_that_do_not_fit_are_refused(pipe, videos, text, message):
    with pytest.raises(ValueError, match=message):
        pipe(videos, text=text)


def test_bad_arguments_are_refused(pipe, clips):
    with pytest.raises(TypeError, match=r"Unknown arguments \['prun_ratio'\]"):
        pipe(clips[0], text="Hi", prun_ratio=0.5)
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=f"`batch_size` must be at least 1, got {batch_size}"):
            pipe(clips, text="Hi", batch_size=batch_size)
    with pytest.raises(ValueError, match=r"nothing\.mp4 does not exist"):
        pipe("nothing.mp4", text="Hi")


def test_saved_pipeline_loads_and_answers_the_same(pipe, clips, tmp_path):
    expected = pipe(clips[0], text="Hi", **GREEDY)
    pipe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["custom_pipelines"]["video-text-to-text"]["impl"] == "pipeline_stts.VideoTextToTextPipeline"
    assert {"pipeline_stts.py", "processing_molmo2_stts.py", "stts_video.py"} <= {p.name for p in tmp_path.iterdir()}
    loaded = pipeline("video-text-to-text", model=str(tmp_path), device="cpu")
    assert type(loaded) is VideoTextToTextPipeline
    assert type(loaded.processor) is Molmo2SttsProcessor
    assert type(loaded.model) is Molmo2SttsForConditionalGeneration
    assert loaded(clips[0], text="Hi", **GREEDY) == expected
