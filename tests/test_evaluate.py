import json
import sys

import numpy as np
import pytest
import torch
from benchmark import build_benchmark, read_benchmark
from conversations import ConversationWriter, frames_to_inputs, pad_left
from evaluate import batches, count_covers, decode, main, parse_model, question_mask, right_answers, write_prompts
from model import make_model, make_processor, make_tokenizer
from rules import apply_rule


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_benchmark(tmp_path_factory.mktemp("benchmark") / "videos", {"short": 0, "long": 0, "detail": 2})


@pytest.fixture(scope="module")
def processor():
    return make_processor(make_tokenizer())


@pytest.fixture(scope="module")
def samples(folder, processor):
    return decode(read_benchmark(folder), processor, num_frames=4, workers=2)


def loud_model(processor):
    """Random weights, enlarged so that answers differ."""
    model = make_model(processor.tokenizer, seed=0).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2 if weight.dim() > 1 else 1)
    return model


@pytest.mark.parametrize("rule", ["stts", "stts with compact positions", "uniform stride"])
@pytest.mark.parametrize("ratio", [0.0, 0.6])
@torch.no_grad()
def test_questions_that_share_a_video_get_the_logits_of_questions_alone(processor, samples, rule, ratio):
    model = loud_model(processor)
    apply_rule(model, rule)
    writer, answers = ConversationWriter(processor), []
    for sample in samples:
        for question in sample.video.questions:
            alone = pad_left(
                [writer.write(sample.video.scene, sample.frames, [question])],
                writer.pad_token_id,
                writer.image_token_ids,
            )
            outputs = model(**alone, **frames_to_inputs(sample.images[None]), prune_ratio=ratio)
            is_answer = outputs.labels[0, 1:] >= 0
            answers.append(outputs.logits[0, :-1][is_answer])
    shared = []
    forward = model.forward
    model.forward = lambda **inputs: shared.append(forward(**inputs).logits) or forward(**inputs)
    prompts = write_prompts(samples, writer)
    rows, video = right_answers(model, samples, prompts, ratio)
    assert [len(row) for row in rows] == [2, 2]
    labels = prompts.inputs["labels"]
    if ratio > 0:
        model.forward = forward
        labels = model.cut_inputs(video.keep_masks, dict(prompts.inputs), prompts.position_ids)[0]["labels"]
    is_answer = labels[:, 1:] >= 0
    torch.testing.assert_close(shared[0][:, :-1][is_answer], torch.cat(answers), atol=2e-4, rtol=1e-4)
    is_right = (shared[0][:, :-1].argmax(-1) == labels[:, 1:])[is_answer]
    lengths = [len(answer) for answer in answers]
    assert sum(rows, []) == [bool(part.all()) for part in is_right.split(lengths)]


@torch.no_grad()
def test_an_answer_counts_if_and_only_if_every_token_is_right(processor, samples):
    model, writer = make_model(processor.tokenizer, seed=0).eval(), ConversationWriter(processor)
    prompts = write_prompts(samples, writer)
    labels = prompts.inputs["labels"]

    class Answering(torch.nn.Module):
        """Says what the labels say, but for one token."""

        device, get_video_features = model.device, model.get_video_features

        def __init__(self, wrong):
            super().__init__()
            self.wrong = wrong

        def forward(self, **inputs):
            says = labels.clamp(min=0).roll(-1, dims=1)
            if self.wrong is not None:
                says[self.wrong] += 1
            return type("Output", (), {"logits": torch.nn.functional.one_hot(says, 600).float()})

    assert right_answers(Answering(None), samples, prompts, 0.0)[0] == [[True, True], [True, True]]
    last = (labels[1] >= 0).nonzero()[-1].item() - 1
    assert right_answers(Answering((1, last)), samples, prompts, 0.0)[0] == [[True, True], [True, False]]


def test_who_sees_whom_by_hand():
    # Padding, text, video, video, then two questions of one token.
    mask = question_mask(
        torch.tensor([[0, 0, 0, 0, 1, 2]]),
        torch.tensor([[0, 1, 1, 1, 1, 1]]),
        torch.tensor([[0, 0, 1, 1, 0, 0]]),
    )
    assert mask[0, 0].long().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 0, 1],
    ]


def test_covers_count_windows_of_digits_and_of_where_they_were(samples):
    everything = count_covers(samples, [torch.ones(4, 36)] * 2)
    assert everything["windows"] == everything["kept"] == 2 * 3 * 36
    assert 0 < everything["touched"] == everything["kept_touched"] < everything["windows"]
    nothing = count_covers(samples, [torch.cat([torch.ones(1, 36), torch.zeros(3, 36)])] * 2)
    assert nothing["touched"] == everything["touched"] and "kept" not in nothing


def test_batches_have_one_length(samples):
    groups = list(batches([*samples, samples[0]._replace(frames=np.arange(2))]))
    assert [len(group) for group in groups] == [2, 1]


def test_the_command_line_writes_counts_of_every_setting(folder, processor, tmp_path, monkeypatch):
    model = make_model(processor.tokenizer, seed=0)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    args = [tmp_path / "results.json", folder, f"random:3:{tmp_path / 'model'}"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    main()
    rows = [row for row in json.loads((tmp_path / "results.json").read_text()) if row["set"] == "detail"]
    assert [(row["rule"], row["seed"], row["ratio"]) for row in rows] == [
        ("random", 3, ratio) for ratio in (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
    ]
    for row in rows:
        assert [counts[1:] for counts in row["questions"].values()] in (
            [[2, 0.2], [2, 2 / 36]],
            [[2, 2 / 36], [2, 0.2]],
        )
        kept = int(36 * 16 * 2 * (1 - row["ratio"])) - 72
        assert abs(row["windows"].get("kept", 0) - max(kept, 0)) <= 2


def test_a_model_is_rule_seed_and_folder(tmp_path):
    assert parse_model(f"stts without key bias:12:{tmp_path}") == ("stts without key bias", 12, str(tmp_path))
    (tmp_path / "a:b").mkdir()
    assert parse_model(f"random:0:{tmp_path / 'a:b'}") == ("random", 0, str(tmp_path / "a:b"))


@pytest.mark.parametrize(
    "entry, message",
    [
        ("sttss:0:.", "RULE of 'sttss:0:.' must be one of: unpruned, stts, "),
        ("stts", "SEED of 'stts' must be a whole number; a model is RULE:SEED:FOLDER"),
        ("stts:-1:.", "SEED of 'stts:-1:.'"),
        ("stts:0", "FOLDER of 'stts:0' is not a folder"),
        ("stts:0:none", "FOLDER of 'stts:0:none' is not a folder"),
    ],
)
def test_other_models_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        parse_model(entry)
