import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ask_a_video import main


SCRIPT = Path(__file__).parents[1] / "examples" / "ask_a_video.py"
ROW = re.compile(r"^ +(\d+)% +(\d+) +(\d+) +\d+ +\d+  (.*)$", re.MULTILINE)


def test_answers_rightly_about_a_video_that_it_makes(tmp_path):
    command = [sys.executable, SCRIPT, "--save", tmp_path / "kept.mp4"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path / 'kept.mp4'}: 32 frames" in result.stdout
    answer = re.search(r"^The right answer is (\d)\.$", result.stdout, re.MULTILINE)[1]
    assert "Which digit is " in result.stdout
    rows = ROW.findall(result.stdout)
    # 32 frames of 36 windows; the first frame stays whole, and its 36 are among what is kept.
    assert [row[:2] for row in rows] == [("0", "1152"), ("50", "576"), ("80", "231")]
    assert len({int(prompt) - int(kept) for _, kept, prompt, _ in rows}) == 1
    assert [row[3] for row in rows] == [answer] * 3


def test_answers_about_a_file_of_the_user(clip, tiny_folder, monkeypatch, capsys):
    args = [clip, "--model", tiny_folder, "--num-frames", 4, "--prune-ratios", 0, 0.5, "--question", "What?"]
    monkeypatch.setattr(sys, "argv", ["ask_a_video.py", *map(str, args)])
    main()
    printed = capsys.readouterr().out
    assert f"{clip}: 4 frames" in printed and "right answer" not in printed
    (_, all_tokens, prompt, _), (_, kept, shorter, _) = ROW.findall(printed)
    assert (all_tokens, kept) == ("324", "162")
    assert int(prompt) - int(shorter) == 162


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["missing.mp4"], "missing.mp4 is not a file."),
        (["--prune-ratios", "0", "1"], "A prune ratio must be at least 0 and less than 1, got 1.0."),
        (["--seed", "-1"], "The seed must be from 0 to 2147483647, got -1."),
    ],
)
def test_bad_input_is_one_line(given, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ask_a_video.py", *given])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == f"error: {words}"


def test_weights_that_were_downloaded_in_part(clip, tiny_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "part")
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    monkeypatch.setattr(sys, "argv", ["ask_a_video.py", str(clip), "--model", str(folder)])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code.startswith(f"error: The weights of {folder} cannot be read; are they there as a whole?")
