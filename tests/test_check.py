import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_upload.check import NOT_RUN, _bare_environment, check, find_forbidden, report_path
from hub_upload.folder import PACKAGE, file_hashes, folder_hash
from hub_upload.stranger import STEPS
from modeling_stts.stts_release import VERSION


@pytest.fixture
def folder(checked_folder, tmp_path):
    return Path(shutil.copytree(checked_folder, tmp_path / "folder"))


def findings(folder):
    """The findings on a folder that is broken so much that its code does not run."""
    report = check(folder)
    assert not report.passed and report.to_text().endswith("NOT passed")
    found = {finding.name: finding for finding in report.findings}
    assert all(found[name].message == NOT_RUN for name in STEPS)
    assert json.loads(report_path(folder).read_text())["passed"] is False
    return found


def failures(folder):
    return {
        name: finding.message for name, finding in findings(folder).items() if name not in STEPS and not finding.passed
    }


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder):
    """Splits the weights into two files with an index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:50], "model-00002-of-00002.safetensors": names[50:]}
    for file, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / file, {"format": "pt"})
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def test_a_good_folder_passes_and_is_only_read(checked_folder):
    written = json.loads(report_path(checked_folder).read_text())
    assert written["passed"] is True, written
    assert written["version"] == VERSION
    assert written["folder_hash"] == folder_hash(file_hashes(checked_folder))
    names = [finding["name"] for finding in written["findings"]]
    assert names == ["files", "configuration", "code", "weights", "card", *STEPS]
    assert {path.name for path in checked_folder.parent.iterdir()} == {"tiny", "tiny.check.json"}


def test_what_only_loading_finds_is_reported_by_step(folder):
    edit_json(folder / "tokenizer_config.json", tokenizer_class="NoSuchTokenizer")
    (folder / "tokenizer.json").write_text("{}")
    shard(folder)
    report = check(folder)
    failed = {finding.name for finding in report.findings if not finding.passed}
    assert failed == {
        "AutoProcessor",
        "a tiny video",
        "ratio 0 equals native Molmo2",
        "pipeline",
        "saves and loads again",
    }
    assert "FAIL  AutoProcessor: " in report.to_text() and "a secret" not in report.to_json()


def test_the_process_gets_no_token(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_CACHE", "PYTHONPATH"):
        monkeypatch.setenv(name, "secret")
    assert "secret" not in _bare_environment("/scratch").values()


def test_changed_code_is_named_and_never_runs(folder, tmp_path):
    trap = tmp_path / "it ran"
    with open(folder / "stts_loss.py", "a") as file:
        file.write(f"open({str(trap)!r}, 'w')\n")
    failed = failures(folder)
    assert failed.keys() == {"code", "card"} and failed["code"].endswith(": stts_loss.py")
    assert not trap.exists()


def test_a_missing_code_file(folder):
    (folder / "stts_loss.py").unlink()
    assert "stts_loss.py" in failures(folder)["code"]


FOREIGN_CODE = [
    ("config.json", "auto_map", {"AutoModelForCausalLM": "other/repo--modeling.Model"}),
    ("config.json", "custom_pipelines", {"text-generation": {"impl": "other/repo--pipeline.Pipeline"}}),
    ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["other/repo--tokenizer.Tokenizer", None]}),
    ("processor_config.json", "image_processor", {"auto_map": {"AutoImageProcessor": "other/repo--image.Processor"}}),
]


@pytest.mark.parametrize("name, field, value", FOREIGN_CODE)
def test_code_of_another_repository_is_refused(folder, name, field, value):
    old = json.loads((folder / name).read_text()).get(field, {})
    edit_json(folder / name, **{field: {**old, **value}})
    message = failures(folder)["code"]
    assert message.startswith(f"{name}: ") and "code of another repository" in message and "other/repo--" in message


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def spoil(weights):
    weights["lm_head.weight"][3, 4] = torch.nan


def test_weights_that_are_not_finite(folder):
    edit_weights(folder, spoil)
    assert failures(folder) == {
        "weights": "model.safetensors: lm_head.weight has values that are not finite (NaN or infinite)"
    }


def test_truncated_weights(folder):
    os.truncate(folder / "model.safetensors", 100_000)
    assert "model.safetensors cannot be read" in failures(folder)["weights"]


def test_a_missing_and_an_extra_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").rename(folder / "model-00002-of-00003.safetensors")
    message = failures(folder)["weights"]
    assert "missing: ['model-00002-of-00002.safetensors']" in message
    assert "do not belong there: ['model-00002-of-00003.safetensors']" in message


def test_a_shard_without_what_the_index_says(folder):
    shard(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors does not hold" in failures(folder)["weights"]


def test_a_configuration_of_another_release_or_with_a_wrong_value(folder):
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", stts_release={**config["stts_release"], "version": "0.0.9"})
    assert "'0.0.9'" in failures(folder)["configuration"]
    edit_json(folder / "config.json", **{**config, "image_patch_id": "five"})
    assert "image_patch_id" in failures(folder)["configuration"]


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("pipeline_tag: video-text-to-text\n", "pipeline_tag: text-generation\n", "`pipeline_tag` must be"),
        ("license: apache-2.0\n", "", "`license` is missing"),
        ("library_name", "library_name: [", "README.md|mapping|parsing|expected"),
        ("revision = ", "revised = ", "no snippet with a pinned revision"),
    ],
)
def test_bad_cards(folder, old, new, words):
    os.truncate(folder / "model.safetensors", 8)  # so that nothing has to run
    text = (folder / "README.md").read_text()
    assert text.count(old) >= 1
    (folder / "README.md").write_text(text.replace(old, new, 1))
    found = findings(folder)
    assert not found["card"].passed
    assert any(word in found["card"].message for word in words.split("|"))


def test_no_card(folder):
    os.truncate(folder / "model.safetensors", 8)
    (folder / "README.md").unlink()
    assert "no model card" in failures(folder)["card"]


def test_folders_that_cannot_be_checked_leave_no_report(folder, tmp_path):
    (folder / "LICENSE").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="LICENSE is a symbolic link to /etc/hostname"):
        check(folder)
    (folder / "LICENSE").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        check(folder)
    assert not report_path(folder).exists()


def test_our_code_has_nothing_forbidden():
    for path in PACKAGE.glob("*.py"):
        assert find_forbidden(path.read_text()) == [], path.name


@pytest.mark.parametrize(
    "code, problem",
    [
        ("import subprocess", "line 1 imports subprocess"),
        ("\nimport torch, requests.api", "line 2 imports requests.api"),
        ("def f():\n    from socket import create_connection", "line 2 imports socket.create_connection"),
        ("from os import system", "line 1 imports os.system"),
        ("import os\nos.execv('a', [])", "line 2 uses os.execv"),
        ("import _posixsubprocess", "line 1 imports _posixsubprocess"),
        ("import os as o", "line 1 imports os as o"),
        ("from os import *", "line 1 imports os.*"),
        ("import concurrent.futures", "line 1 imports concurrent.futures"),
        ("from torch import multiprocessing", "line 1 imports torch.multiprocessing"),
        ("import torch.hub", "line 1 imports torch.hub"),
        ("eval('1')", "line 1 uses eval"),
        ("__import__('socket')", "line 1 uses __import__"),
    ],
)
def test_forbidden_code_is_found(code, problem):
    assert find_forbidden(code) == [problem]


@pytest.mark.parametrize(
    "code", ["import os\nos.path.join('a')", "from . import x", "from av import open", "import re"]
)
def test_allowed_code(code):
    assert find_forbidden(code) == []
