import json

import measure_scaling
import pytest
from measure_scaling import efficiency, to_markdown


def row(num_processes, frames_per_second, **changes):
    settings = {"device": "a GPU", "mode": "full", "num_frames": 64, "prune_ratio": 0.5, "distributed": "FSDP"}
    measured = {"step_ms": 1000.0, "peak_gb": None, "frames_per_second": frames_per_second}
    return settings | measured | {"num_processes": num_processes} | changes


def test_efficiency_is_against_one_process_with_the_same_settings():
    rows = [
        row(2, 150.0),
        row(1, 100.0),
        row(1, 80.0, mode="lora"),
        row(2, 120.0, mode="lora"),
        row(2, 9.0, prune_ratio=0),
    ]
    assert [efficiency(each, rows) for each in rows] == [0.75, 1.0, 1.0, 0.75, None]
    assert "| a GPU | full | 64 | 0.5 | FSDP | 2 | 1000 | 150 | - | 0.75 |" in to_markdown(rows).split("\n")


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_every_run_adds_a_row(tmp_path, capsys, mode):
    path = tmp_path / "scaling.json"
    for num_frames in (2, 3):
        options = ["--tiny", "--mode", mode, "--num-frames", str(num_frames), "--warm-up", "0", "--steps", "1"]
        measure_scaling.main([str(path), *options])
    rows = json.loads(path.read_text())
    assert [(each["num_frames"], each["num_processes"], each["mode"]) for each in rows] == [(2, 1, mode), (3, 1, mode)]
    assert all(
        each["frames_per_second"] * each["step_ms"] == pytest.approx(1000 * each["num_frames"]) for each in rows
    )
    assert capsys.readouterr().out.count("| CPU |") == 3
