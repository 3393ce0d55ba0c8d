import json
import sys

import last_digit
import pytest
from finetuning.samples import read_samples
from scenes import draw_scene


def test_the_answer_is_the_digit_that_starts_last(tmp_path):
    out = last_digit.build_data(tmp_path / "data", {"train": 2, "test": 1}, first_seed=7)
    for split, seeds in (("train", (7, 8)), ("test", (7,))):
        samples = read_samples(out / f"{split}.jsonl")
        assert [sample.media("video") for sample in samples] == [[str(out / split / f"short-{s}.mp4")] for s in seeds]
        for sample, seed in zip(samples, seeds):
            digits = [sprite for sprite in draw_scene("short", split, seed).sprites if sprite.label >= 0]
            last = max(digits, key=lambda sprite: sprite.start)
            assert sample.messages[1]["content"] == str(last.label)
            assert (out / split / f"short-{seed}.mp4").stat().st_size > 0


def test_lines_are_what_data_sets_of_the_hub_have(tmp_path, monkeypatch, capsys):
    argv = ["last_digit.py", str(tmp_path / "data"), "--num-videos", "1", "0", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    last_digit.main()
    (line,) = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == ["messages"]
    assert "1 videos" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: .*exists"):
        last_digit.main()


@pytest.mark.parametrize("num_videos", [{"train": 1, "test": -1}, {"train": 1, "dev": 1}])
def test_a_failure_midway_leaves_nothing_behind(tmp_path, num_videos):
    with pytest.raises(ValueError, match="got (-1|'dev')"):
        last_digit.build_data(tmp_path / "data", num_videos)
    assert list(tmp_path.iterdir()) == []
