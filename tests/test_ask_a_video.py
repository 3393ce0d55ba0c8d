import re
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[1] / "examples" / "ask_a_video.py"


def run(*args, cwd):
    command = [sys.executable, SCRIPT, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd)


def test_prints_tokens_times_and_answers_for_each_ratio(clip):
    result = run(clip, "--num-frames", 4, "--prune-ratios", 0, 0.5, cwd=SCRIPT.parents[1])
    assert result.returncode == 0, result.stderr
    assert "its answers mean nothing" in result.stdout
    assert f"{clip}: 4 frames" in result.stdout
    rows = re.findall(r"^ +(\d+)% +(\d+) +(\d+) +\d+ +\d+  '", result.stdout, re.MULTILINE)
    (_, all_tokens, prompt), (_, kept, shorter) = [tuple(map(int, row)) for row in rows]
    assert (all_tokens, kept) == (324, 162)
    assert prompt - shorter == 162
