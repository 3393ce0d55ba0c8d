import json

import measure_speed
import pytest
from inputs import PLACEHOLDER
from speed import shapes

from hub_upload.tiny import tiny_config


def tiny_shapes():
    fields = tiny_config().to_dict()
    names = ("vision_config", "adapter_config", "text_config", "frame_start_token_id", "frame_end_token_id")
    return {name: fields[name] for name in names} | {"image_patch_id": PLACEHOLDER}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SIZES, "cpu", tiny_shapes())


def test_every_part_is_measured_once_and_a_run_goes_on_where_the_file_ends(tiny, tmp_path, capsys):
    path = tmp_path / "speed.json"
    command = [str(path), "--size", "cpu", "--num-frames", "2", "--batch-sizes", "1", "--runs", "1", "--long", "3"]
    parts = ["--parts", "prefill", "training", "decoding", "long"]
    measure_speed.main([*command, "--parts", "prefill"])
    before = json.loads(path.read_text())["parts"]
    measure_speed.main([*command, *parts])
    results = json.loads(path.read_text())
    assert results["parts"]["prefill 2 frames, batch 1"] == before["prefill 2 frames, batch 1"]
    rows = [row for part in results["parts"].values() for row in part]
    kinds = [(row["kind"], row["num_frames"], row["candidate"], row["prune_ratio"]) for row in rows]
    each = [("native", 0.0), ("stts", 0.0), ("stts", 0.5), ("stts", 0.8)]
    assert kinds[:4] == [("prefill", 2, *candidate) for candidate in each]
    assert kinds[4:8] == [("decoding", 2, *candidate) for candidate in each]
    assert kinds[8:11] == [("training", 2, *candidate) for candidate in each[:3]]
    assert kinds[11:] == [("prefill", 3, "stts", 0.5)]
    assert rows[2]["cache_bytes"] < rows[0]["cache_bytes"] == rows[1]["cache_bytes"]
    assert rows[2]["scoring_ms"] > 0 and rows[0]["scoring_ms"] == rows[1]["scoring_ms"] == 0
    # On a CPU nothing is launched ahead.
    assert all(0 < row["launch_ms"] <= row["llm_ms"] for row in rows[:4])
    assert results["about"]["matmul_tflops"] > 0
    assert "Prefill, batch of 1" in capsys.readouterr().out


def test_no_part_begins_after_the_time(tiny, tmp_path, capsys):
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({"about": None, "parts": {"kept": []}}))
    measure_speed.measure(measure_speed.parse_args([str(path), "--size", "cpu", "--minutes", "0"]))
    assert "No time for prefill 32 frames, batch 1." in capsys.readouterr().out
    assert json.loads(path.read_text())["parts"] == {"kept": []}
