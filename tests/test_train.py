import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversations import Conversations, render_inputs
from model import make_model, make_processor, make_tokenizer
from pictures import NUM_DIGITS, PictureLearner, Pictures
from render import Renderer
from safetensors.torch import load_file
from torch.nn import functional as F
from train import main


SCRIPT = Path(__file__).parents[1] / "examples" / "moving_digits" / "train.py"


def train(out, *args, ok=True):
    command = [sys.executable, SCRIPT, out, "--frames-per-batch", "2", "--workers", "0", "--warm-up-steps", "1", *args]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert (result.returncode == 0) == ok, result.stderr
    return result


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A model after three steps on pictures, without interruption."""
    folder = tmp_path_factory.mktemp("pictures") / "whole"
    assert "finished" in train(folder, "--stage", "pictures", "--steps", 3).stdout
    return folder / "final"


def test_an_interrupted_training_goes_on_to_the_same_weights(pictures, tmp_path):
    # Stops after its first step.
    assert "stopped" in train(tmp_path / "cut", "--stage", "pictures", "--steps", 3, "--minutes", 1e-9).stdout
    assert not (tmp_path / "cut" / "final").exists()
    assert "finished" in train(tmp_path / "cut", "--stage", "pictures", "--steps", 3).stdout
    whole = load_file(pictures / "model.safetensors")
    cut = load_file(tmp_path / "cut" / "final" / "model.safetensors")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(weight, cut[name]) for name, weight in whole.items())


def test_a_rule_is_trained_from_trained_weights(pictures, tmp_path):
    processor = make_processor(make_tokenizer())
    batches = (Conversations(processor, 1, seed, frames_per_batch=16, prune_ratios=[0.5])[0] for seed in range(99))
    # One video of 16 frames is enough.
    seed = next(seed for seed, batch in enumerate(batches) if batch["name"] == "detail")
    args = ("--init", pictures, "--rule", "stts", "--steps", 1, "--frames-per-batch", 16, "--seed", seed)
    assert "finished" in train(tmp_path / "stts", *args).stdout
    before, after = (load_file(folder / "model.safetensors") for folder in (pictures, tmp_path / "stts" / "final"))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert any("temporal_token_scorer" in name for name in changed)
    assert any("transformer.blocks" in name or "lm_head" in name for name in changed)


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_out_of_range_is_refused(tmp_path, monkeypatch, capsys, seed):
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "out"), f"--seed={seed}"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"--seed must be from 0 to 2147483647, got {seed}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_picture_learner_minimises():
    processor = make_processor(make_tokenizer())
    model = make_model(processor.tokenizer, seed=0)
    learner = PictureLearner(model)
    item = Pictures(processor, num_batches=10, seed=0, frames_per_batch=3)[9]
    inputs = render_inputs(item.pop("layout"), Renderer("train"), item.pop("seed"))
    item.pop("name")
    outputs = learner(**item, **inputs)
    hidden = model.model.vision_tower(inputs["pixel_values_videos"], output_hidden_states=True).hidden_states
    windows = torch.cat([hidden[8], hidden[6]], dim=-1).flatten(0, 1)[inputs["video_token_pooling"]].mean(1)
    digits, colours = learner.head(windows).split([NUM_DIGITS, 7], dim=-1)
    text = {name: item[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels")}
    expected = (
        F.cross_entropy(digits, item["window_labels"][..., 0].flatten())
        + F.cross_entropy(colours, item["window_labels"][..., 1].flatten())
        + model(**text, **inputs, prune_ratio=0.0).loss
    )
    torch.testing.assert_close(outputs.loss, expected)


def test_pictures_grow_from_two_digits_to_six():
    processor = make_processor(make_tokenizer())
    batches = Pictures(processor, num_batches=40, seed=0, frames_per_batch=40)
    most = [int((batches[i]["layout"].visible.sum((1, 2)) - 1).max()) for i in (0, 39)]
    assert most[0] <= 2 and most[1] == 6
