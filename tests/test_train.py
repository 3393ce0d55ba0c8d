import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conversations import Conversations
from model import make_model, make_processor, make_tokenizer
from safetensors.torch import load_file
from torch import nn
from train import main, make_optimizer, make_stage


SCRIPT = Path(__file__).parents[1] / "examples" / "moving_digits" / "train.py"


def command(out, *args):
    return list(map(str, [SCRIPT, out, "--workers", 0, "--warm-up-steps", 1, *args]))


def train(out, *args):
    with mock.patch.object(sys, "argv", command(out, *args)):
        main()
    return out / "final"


LEARN_PICTURES = ("--stage", "pictures", "--frames-per-batch", 2, "--steps", 3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A model after three steps on pictures, without interruption."""
    return train(tmp_path_factory.mktemp("pictures") / "whole", *LEARN_PICTURES)


def test_an_interrupted_training_goes_on_to_the_same_weights(pictures, tmp_path, capsys):
    # Stops after its first step.
    assert not train(tmp_path / "cut", *LEARN_PICTURES, "--minutes", 1e-9).exists()
    assert "stopped" in capsys.readouterr().out
    in_a_fresh_process = [sys.executable, *command(tmp_path / "cut", *LEARN_PICTURES)]
    result = subprocess.run(in_a_fresh_process, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0 and "finished" in result.stdout, result.stderr
    whole = load_file(pictures / "model.safetensors")
    cut = load_file(tmp_path / "cut" / "final" / "model.safetensors")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(weight, cut[name]) for name, weight in whole.items())


def detail_seed():
    """A seed whose first batch is of the set with the shortest videos; one of 16 frames is enough."""
    processor = make_processor(make_tokenizer())
    batches = (Conversations(processor, 1, seed, frames_per_batch=16, prune_ratios=[0.5])[0] for seed in range(99))
    return next(seed for seed, batch in enumerate(batches) if batch["name"] == "detail")


def test_a_rule_is_trained_from_trained_weights_and_goes_on_with_those_of_its_checkpoint(pictures, tmp_path, capsys):
    args = ("--init", pictures, "--rule", "stts", "--steps", 1, "--frames-per-batch", 16, "--seed", detail_seed())
    final = train(tmp_path / "stts", *args)
    assert "finished" in capsys.readouterr().out
    before, after = (load_file(folder / "model.safetensors") for folder in (pictures, final))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert any("temporal_token_scorer" in name for name in changed)
    assert any("transformer.blocks" in name or "lm_head" in name for name in changed)
    shutil.rmtree(final)
    train(tmp_path / "stts", *args)  # no step is left
    again = load_file(final / "model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in after.items())


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_out_of_range_is_refused(tmp_path, monkeypatch, capsys, seed):
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "out"), f"--seed={seed}"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"--seed must be from 0 to 2147483647, got {seed}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_learning_rates_rise_stay_and_fall_by_part():
    model = nn.ModuleDict({"vision_tower": nn.ModuleDict({"scorer": nn.Linear(1, 1), "block": nn.Linear(1, 1)})})
    model["head"] = nn.Linear(1, 1)
    rates = {"learning_rate": 1.0, "vision_learning_rate": 2.0, "scorer_learning_rate": 4.0}
    optimizer, schedule = make_optimizer(
        nn.ModuleDict({"model": model}), argparse.Namespace(**rates, warm_up_steps=4, steps=20)
    )
    assert {group["initial_lr"]: len(group["params"]) for group in optimizer.param_groups} == {4.0: 2, 2.0: 2, 1.0: 2}
    factors = [schedule.lr_lambdas[0](step) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and set(factors[3:15]) == {1.0}
    assert factors[15:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])


def test_only_original_positions_have_gaps():
    tokenizer = make_tokenizer()
    options = {"stage": "videos", "steps": 1, "seed": 0, "frames_per_batch": 16, "easy_steps": 0}
    for rule, has_gaps in (("unpruned", True), ("stts", True), ("stts with compact positions", False)):
        args = argparse.Namespace(**options, rule=rule)
        _, batches = make_stage(make_model(tokenizer, 0), make_processor(tokenizer), args)
        assert batches.has_gaps == has_gaps
