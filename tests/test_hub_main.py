import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import logging

from hub_upload.__main__ import main
from hub_upload.check import report_path


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


OPTIONS = {
    "": ["build", "check", "push", "convert", "card"],
    "convert": ["OUT", "SOURCE", "--processor", "--dtype", "--max-position-embeddings"],
    "build": ["OUT", "--source", "--adapter", "--prune-ratio", "--method", "--dtype", "tiny"],
    "check": ["FOLDER", "--json"],
    "card": ["FOLDER", "REPO", "--license", "--revision", "--base-model", "--dataset", "--results", "--about"],
    "push": ["FOLDER", "REPO", "--public", "--branch", "--tag", "--pull-request", "--message", "--dry-run", "--yes"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(capsys, command):
    with pytest.raises(SystemExit) as exit_info:
        main([*command.split(), "--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in OPTIONS[command])


def test_convert(tiny_folder, tmp_path, capsys):
    assert main(["convert", str(tmp_path / "out"), str(tiny_folder), "--dtype", "float16"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == "170 kept, 4 split, 2 joined" and printed[-1].endswith(f"to {tmp_path / 'out'}")
    assert '"dtype": "float16"' in (tmp_path / "out" / "config.json").read_text()
    assert main(["convert", str(tmp_path / "out"), str(tiny_folder)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'out'} exists.")


def test_card(tiny_folder, tmp_path, capsys):
    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    (tmp_path / "results.json").write_text("[]")
    arguments = ["card", str(folder), "user/name", "--license", "mit"]
    assert main([*arguments, "--base-model", "org/base", "--dataset", "org/a", "--dataset", "org/b"]) == 0
    assert capsys.readouterr().out == f"Wrote {folder / 'README.md'}\n"
    assert "datasets:\n- org/a\n- org/b\n" in (folder / "README.md").read_text()
    assert main([*arguments, "--results", str(tmp_path / "results.json")]) == 1
    assert "results.json must be a JSON object" in capsys.readouterr().err


def test_check_that_is_not_passed(checked_folder, tmp_path, capsys):
    folder = shutil.copytree(checked_folder, tmp_path / "folder")
    os.truncate(folder / "model.safetensors", 1000)
    assert main(["check", str(folder)]) == 1
    assert "FAIL  weights: model.safetensors cannot be read" in capsys.readouterr().out
    assert main(["check", str(folder), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(report_path(folder).read_text()) and printed["passed"] is False
    (folder / "model.safetensors").unlink()
    assert main(["check", str(folder)]) == 1
    assert capsys.readouterr().err == f"error: {folder} has no weights (*.safetensors).\n"


def test_push_asks_first(hub, checked_folder, capsys, monkeypatch):
    arguments = ["push", str(checked_folder), "user/tiny", "--tag", "v1"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "  add     model.safetensors\n" in capsys.readouterr().out
    for answer in ("n", ""):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert main(arguments) == 1
        assert "nothing was pushed" in capsys.readouterr().err
    assert hub.repositories == {}
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert main(arguments) == 0
    commit = hub.repositories["user/tiny"].refs["refs/tags/v1"]
    assert f"Pushed {commit} and compared it" in capsys.readouterr().out


def test_push_with_yes_and_errors_of_the_hub(hub, checked_folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    arguments = ["push", str(checked_folder), "user/tiny", "--tag", "v1"]
    assert main(arguments) == 1 and hub.repositories == {}
    assert main([*arguments, "--yes"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--yes"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: user/tiny already has the tag 'v1'.")


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
