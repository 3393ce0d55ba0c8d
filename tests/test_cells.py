import pytest
import torch
from speed import cells
from speed.cells import Candidate, Runs, measure_attention, measure_decoding, run_in_turns
from transformers import Molmo2Config

from hub_upload.tiny import tiny_model


CPU = torch.device("cpu")


def test_candidates_take_turns_and_medians_count_without_the_warm_up():
    order, numbers = [], iter([900.0, 900.0, 1.0, 10.0, 5.0, 30.0, 2.0, 20.0])

    def run(candidate):
        order.append(candidate.name)
        return {"total_ms": next(numbers)}

    rows = run_in_turns([Candidate("native", None), Candidate("stts", None, 0.5)], run, CPU, Runs(1, 3, 3))
    assert order == ["native", "stts"] * 4
    assert [(row["candidate"], row["prune_ratio"], row["total_ms"], row["num_runs"]) for row in rows] == [
        ("native", 0.0, 2.0, 3),
        ("stts", 0.5, 20.0, 3),
    ]


def test_a_candidate_out_of_memory_is_recorded_and_the_others_go_on():
    calls = []

    def run(candidate):
        calls.append(candidate.name)
        if candidate.name == "native" and len(calls) > 2:
            raise torch.OutOfMemoryError
        return {"total_ms": 1.0}

    rows = run_in_turns([Candidate("native", None), Candidate("stts", None)], run, CPU, Runs(1, 2, 2))
    assert rows[0]["error"] == "out of memory" and "total_ms" not in rows[0]
    assert rows[1]["num_runs"] == 2 and calls == ["native", "stts", "native", "stts", "stts"]


def test_memory_that_was_left_is_given_back_before_candidates_run(monkeypatch):
    order = []
    monkeypatch.setattr(cells, "_free", lambda device: order.append("free"))
    run_in_turns([Candidate("stts", None)], lambda candidate: order.append("run") or {"ms": 0.0}, CPU, Runs(0, 1, 1))
    assert order == ["free", "run"]


def test_a_failure_is_recorded_in_its_own_words():
    def run(candidate):
        raise RuntimeError("no kernel")

    assert run_in_turns([Candidate("stts", None)], run, CPU, Runs())[0]["error"] == "RuntimeError: no kernel"


def test_a_way_of_attention_that_fails_is_recorded_too():
    config = Molmo2Config(text_config={"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}).text_config
    rows = measure_attention(config, 1, ["cudnn"], CPU)
    assert "forward_ms" in rows[0] and "NotImplementedError" in rows[1]["error"]


def test_no_candidate_decodes_at_a_length_of_another_and_each_has_a_first_round(monkeypatch):
    rounds, model = [], tiny_model()

    def decode_once(candidate, inputs, num_tokens, device):
        assert {inputs[name].shape for name in ("attention_mask", "mm_token_type_ids")} == {inputs["input_ids"].shape}
        rounds.append((candidate.prune_ratio, inputs["input_ids"].shape[1]))
        return {"tokens_per_second": float(len(rounds))}

    monkeypatch.setattr(cells, "_decode_once", decode_once)
    candidates = [Candidate("stts", model, ratio) for ratio in (0.0, 0.5)]
    rows = measure_decoding(candidates, 2, 24, CPU, Runs(0, 3, 3))
    short = 1 + 2 * (5 + 81) + 20
    assert rounds == [(0.0, short), (0.5, short + 24)] * 4
    assert [(row["tokens_per_second_at_first"], row["tokens_per_second"]) for row in rows] == [(1.0, 5.0), (2.0, 6.0)]


def test_slow_candidates_run_less_often():
    rows = run_in_turns([Candidate("stts", None)], lambda candidate: {"ms": 0.0}, CPU, Runs(0, 9, 2, seconds=-1.0))
    assert rows[0]["num_runs"] == 2


@pytest.mark.parametrize("num_frames", [1, 3])
def test_both_ways_of_attention_agree(monkeypatch, num_frames):
    lengths, lay_out = [], cells.lay_out_tokens
    monkeypatch.setattr(cells, "lay_out_tokens", lambda *args: lengths.append(args[1].shape[1]) or lay_out(*args))
    text = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32}
    rows = measure_attention(Molmo2Config(text_config=text).text_config, num_frames, ["cpu"], CPU)
    assert [row["way"] for row in rows] == ["sdpa", "two passes, cpu"]
    assert rows[1]["num_tokens"] == 21 + 86 * num_frames and lengths == [21 + 86 * num_frames, 22 + 86 * num_frames]
    assert rows[1]["difference"] < 1e-5 and rows[1]["gradient_difference"] < 1e-5
    assert all(row[name] > 0 for row in rows for name in ("first_ms", "next_ms", "forward_ms", "backward_ms"))
