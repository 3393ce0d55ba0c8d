import numpy as np
import pytest
import torch
from conversations import (
    MAX_GAP,
    Conversation,
    Conversations,
    ConversationWriter,
    frames_to_inputs,
    pad_left,
    positions_with_gaps,
    sampled_frames,
)
from model import make_processor, make_tokenizer
from render import Renderer, lay_out
from scenes import draw_questions, draw_scene
from transformers.video_utils import VideoMetadata


@pytest.fixture(scope="module")
def processor():
    return make_processor(make_tokenizer())


@pytest.mark.parametrize("name", ["short", "long", "detail"])
def test_tokens_and_pixels_equal_those_of_the_processor(processor, name):
    scene = draw_scene(name, "train", 3)
    frames = sampled_frames(scene)
    images = Renderer("train").render(lay_out([scene], [frames], "train"), 0)
    questions = draw_questions(scene, np.random.default_rng(0))[:3]
    messages = []
    for turn, question in enumerate(questions):
        content = [{"type": "video"}] * (turn == 0) + [{"type": "text", "text": question.text}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    metadata = VideoMetadata(total_num_frames=scene.num_frames, fps=scene.fps, frames_indices=list(frames))
    expected = processor(
        text=processor.apply_chat_template(messages, tokenize=False),
        videos=[images[0].numpy()],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    written = ConversationWriter(processor).write(scene, frames, questions)
    newline = processor.tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert expected["input_ids"][0].tolist() == written.input_ids + newline
    padded = pad_left([written], 0, processor.image_token_ids)
    length = len(written.input_ids)
    assert torch.equal(padded["mm_token_type_ids"], expected["mm_token_type_ids"][:, :length])
    for key, value in frames_to_inputs(images).items():
        assert torch.equal(value, expected[key]), key


def test_only_answers_and_their_ends_have_labels(processor):
    scene = draw_scene("short", "train", 3)
    questions = draw_questions(scene, np.random.default_rng(0))
    written = ConversationWriter(processor).write(scene, sampled_frames(scene), questions)
    labels = [label for label in written.labels if label != -100]
    expected = "".join(question.answer + "<|im_end|>" for question in questions)
    assert processor.decode(labels) == expected
    assert all(label in (-100, token) for label, token in zip(written.labels, written.input_ids))


def test_the_processor_samples_the_same_frames(processor):
    for name in ("short", "long", "detail"):
        scene = draw_scene(name, "test", 0)
        metadata = VideoMetadata(total_num_frames=scene.num_frames, fps=scene.fps)
        for num_frames in (None, 16, 128, 256):
            sampled = processor.video_processor.sample_frames(metadata, num_frames=num_frames)
            assert sampled.tolist() == sampled_frames(scene, num_frames).tolist()


def test_padding_by_hand():
    padded = pad_left([Conversation([8, 9, 9], [-100, -100, 9]), Conversation([5], [5])], 0, [8, 9])
    assert {name: tensor.tolist() for name, tensor in padded.items()} == {
        "input_ids": [[8, 9, 9], [0, 0, 5]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "mm_token_type_ids": [[1, 1, 1], [0, 0, 0]],
        "labels": [[-100, -100, 9], [-100, -100, 5]],
    }


def test_a_batch_depends_on_the_seed_and_its_number_alone(processor):
    def batch(seed, i):
        item = Conversations(processor, 50, seed, frames_per_batch=64, prune_ratios=[0.0, 0.5])[i]
        return item["name"], item["prune_ratio"], item["input_ids"].tolist(), item["layout"].centre.tolist()

    assert batch(1, 7) == batch(1, 7)
    assert batch(1, 7) != batch(1, 8)
    assert batch(1, 7) != batch(2, 7)


def test_a_batch_has_videos_of_one_length_that_fill_it(processor):
    batches = Conversations(processor, 30, 0, frames_per_batch=128, prune_ratios=[0.3, 0.8])
    seen = [batches[i] for i in range(30)]
    for item in seen:
        num_videos, num_frames = item["layout"].jitter.shape[:2]
        assert num_videos == 128 // num_frames == len(item["input_ids"])
        assert (item["mm_token_type_ids"].sum(1) == (36 + 2) * num_frames).all()
    assert {item["name"] for item in seen} == {"short", "long", "detail"}
    assert {item["prune_ratio"] for item in seen} == {0.3, 0.8}


def test_easy_batches_have_few_digits(processor):
    batches = Conversations(processor, 30, 0, frames_per_batch=256, prune_ratios=[0.0], num_easy=20)

    descriptions = [batches.writer.processor.decode(batches[i]["input_ids"][0]) for i in range(10)]
    assert all(text.count(" appears at second ") <= 2 for text in descriptions)
    later = [batches.writer.processor.decode(ids) for i in range(20, 30) for ids in batches[i]["input_ids"]]
    assert max(text.count(" appears at second ") for text in later) == 4


def test_gaps_stand_behind_frames_and_nowhere_else():
    is_frame_end = torch.zeros(50, 30, dtype=torch.bool)
    is_frame_end[:, [4, 9, 14]] = True
    steps = positions_with_gaps(is_frame_end, np.random.default_rng(0)).diff()
    assert (steps[~is_frame_end[:, :-1]] == 1).all()
    gaps = steps[is_frame_end[:, :-1]] - 1
    assert gaps.min() >= 0 and MAX_GAP / 2 < gaps.max() <= MAX_GAP
    assert len(gaps.unique()) > 50


def test_half_of_the_batches_have_gaps_and_are_the_same_otherwise(processor):
    options = {"frames_per_batch": 64, "prune_ratios": [0.0, 0.5]}
    without, with_gaps = (Conversations(processor, 40, 0, **options, has_gaps=has_gaps) for has_gaps in (False, True))
    num_gapped = 0
    for i in range(40):
        batch, gapped = without[i], with_gaps[i]
        assert "position_ids" not in batch
        assert torch.equal(batch["input_ids"], gapped["input_ids"]) and batch["prune_ratio"] == gapped["prune_ratio"]
        if "position_ids" in gapped:
            num_gapped += 1
            assert gapped["position_ids"].shape == batch["input_ids"].shape
            assert torch.equal(gapped["position_ids"], with_gaps[i]["position_ids"])
    assert 10 <= num_gapped <= 30
