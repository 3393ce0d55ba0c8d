import sys

import measure_memory
import pytest
import torch
from finetuning.collator import Collator
from measure_memory import SavedBytes, build, main, make_batch, measure
from torch import nn
from training_inputs import encode_rows, small_config, turns, write_rows, write_still


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_what_is_saved_for_the_backward_pass_falls_with_the_ratio(mode):
    config = small_config()
    model = build(config, mode, checkpointing=True, device="cpu")
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    batch = make_batch(8, config, "cpu")
    saved = [measure(model, optimizer, batch, ratio)[0] for ratio in (0.3, 0.5, 0.8)]
    assert saved[0] > saved[1] > saved[2] > 0


def test_only_what_is_kept_counts_and_once():
    model, x = nn.Linear(100, 100), torch.ones(100, 100)
    saved = SavedBytes(model)
    with saved:
        hidden = model(x)  # keeps x
        (hidden + 1).sin()  # keeps the sum as long as its own result lives, which is not at all
        total = hidden * hidden  # keeps one memory twice
    assert saved.total() == 2 * 100 * 100 * 4
    del hidden, total
    assert saved.total() == 0


def test_checkpointing_saves_memory():
    config = small_config()
    saved = []
    for checkpointing in (True, False):
        model = build(config, "full", checkpointing, "cpu")
        batch = make_batch(4, config, "cpu")
        saved.append(measure(model, torch.optim.AdamW(model.parameters()), batch, 0.5)[0])
    assert saved[0] < saved[1] / 2


def test_the_batch_is_one_of_the_collator(tmp_path):
    write_still(tmp_path / "a.mp4", 85)
    path = write_rows(tmp_path / "data.jsonl", [turns("Which?", "x", video="a.mp4")])
    real, made = Collator(256)(encode_rows(path)), make_batch(4, small_config(), "cpu")
    assert made.keys() == real.keys() - {"where", "skipped"}
    for name in ("pixel_values_videos", "video_token_pooling", "video_grids", "is_video"):
        assert made[name].shape == real[name].shape, name
    assert made["mm_token_type_ids"].sum() == real["mm_token_type_ids"].sum()
    assert torch.equal(made["video_token_pooling"], real["video_token_pooling"])


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(measure_memory, "tiny_config", small_config)
    args = ["--tiny", "--num-frames", "2", "3", "--prune-ratios", "0.3", "0.8", "--modes", "lora"]
    monkeypatch.setattr(sys, "argv", ["measure_memory.py", *args])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "| mode | frames | 30% pruned | 80% pruned |"
    assert [line.split("|")[1:3] for line in lines[3:]] == [[" lora ", " 2 "], [" lora ", " 3 "]]
    assert float(lines[4].split("|")[3]) > float(lines[4].split("|")[4]) > 0
