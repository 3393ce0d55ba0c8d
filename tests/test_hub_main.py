import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import logging

from hub_upload.__main__ import main


@pytest.fixture(autouse=True)
def keep_verbosity():
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def test_build(tmp_path, capsys):
    assert main(["build", str(tmp_path / "out"), "--source", "tiny", "--prune-ratio", "0.75"]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert '"prune_ratio": 0.75' in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prune-ratio", "1"], ["prune_ratio", "1.0", "0 <= prune_ratio < 1"]),
        (["--prune-ratio", "nan"], ["prune_ratio", "nan"]),
        (["--source", "/no/such/folder"], ["/no/such/folder"]),
    ],
)
def test_expected_errors_are_one_line(tmp_path, capsys, arguments, words):
    assert main(["build", str(tmp_path / "out"), *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert all(word in printed.err for word in ["error: ", *words])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["bake"], ["build"], ["build", "out", "--dtype", "int8"], ["build", "out", "--prune-ratio", "x"]]
)
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["build", "--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ["OUT", "--source", "--prune-ratio", "--method", "--dtype", "tiny"])


def test_as_a_module(tmp_path):
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "hub_upload", "build", str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path} exists")
    assert "Traceback" not in done.stderr
