import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hub_upload.card import pinned_revision, read_results, write_card
from modeling_stts.stts_release import VERSION, code_file_hashes, code_hash


RESULTS = {
    "name": "Moving squares",
    "dataset": "user/squares",
    "rows": [
        {"prune_ratio": 0.0, "accuracy": 0.99, "speedup": 1.0},
        {"prune_ratio": 0.5, "accuracy": 0.9812, "speedup": 1.434, "prefill_ms": 12.5},
    ],
    "hardware": "2 CPU cores",
    "date": "2026-11-24",
    "command": "python measure.py",
}


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder, tmp_path / "folder"))


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    return path


@pytest.mark.parametrize("revision", ['v1"', "v 1", "v1\nimport os", "../v1", ""])
def test_revisions_that_are_not_valid(folder, revision):
    with pytest.raises(ValueError, match=re.escape(f"{revision!r} is not the name of a branch or tag")):
        write_card(folder, "user/name", license="mit", revision=revision)
    assert not (folder / "README.md").exists()


def test_metadata(folder, results):
    path = write_card(
        folder, "user/name", license="apache-2.0", base_model="org/base", datasets=["org/train"], results=[results]
    )
    data = ModelCard.load(path).data
    assert data.pipeline_tag == "video-text-to-text" and data.library_name == "transformers"
    assert data.license == "apache-2.0" and data.datasets == ["org/train"]
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("org/base", "finetune")
    measured = {(result.dataset_type, result.metric_name, result.metric_value) for result in data.eval_results}
    assert measured == {
        ("user/squares", "accuracy at prune ratio 0", 0.99),
        ("user/squares", "accuracy at prune ratio 0.5", 0.9812),
    }


def test_two_measurements_on_one_dataset_stay_apart(folder, results, tmp_path):
    other = {**RESULTS, "name": "Moving squares, long", "rows": [{"prune_ratio": 0.0, "accuracy": 0.5}]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    paths = [results, tmp_path / "other.json"]
    data = ModelCard.load(write_card(folder, "user/name", license="mit", results=paths)).data
    measured = {(result.dataset_name, result.metric_value) for result in data.eval_results}
    assert measured == {("Moving squares", 0.99), ("Moving squares", 0.9812), ("Moving squares, long", 0.5)}


def test_text(folder, results, tmp_path):
    (tmp_path / "about.md").write_text("Counts {squares}.\n")
    text = write_card(
        folder, "user/name", license="mit", revision="v2", results=[results], about=tmp_path / "about.md"
    ).read_text()
    assert "# name\n\nCounts {squares}.\n\nMolmo2 with" in text
    assert "| 0.5 | 98.1 % | 1.43 x | 12.5 |" in text and "| 0 | 99.0 % | 1.00 x | - |" in text
    assert "2 CPU cores, 2026-11-24, by `python measure.py`" in text
    assert f"| code hash | `{code_hash(folder)}` |" in text
    assert all(f"{digest}  {name}\n" in text for name, digest in code_file_hashes(folder).items())
    assert "eprint = {2603.18004}" in text
    assert pinned_revision(folder) == ("user/name", "v2")


def test_facts_come_from_the_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    config["stts_config"].update(prune_ratio=0.75, method="similarity")
    (folder / "config.json").write_text(json.dumps(config))
    text = write_card(folder, "user/name", license="mit").read_text()
    assert "prune_ratio=0.75)" in text and "| prune ratio by default | 0.75 |" in text and "`similarity`" in text
    assert "140,945 in F32" in text
    assert "Neither the accuracy nor the speed of this checkpoint was measured." in text
    assert "base_model" not in text and "model-index" not in text and "model_name" not in text


def test_a_card_can_be_written_again_and_is_the_same(folder):
    first = write_card(folder, "user/name", license="mit").read_bytes()
    assert write_card(folder, "user/name", license="mit").read_bytes() == first
    assert pinned_revision(folder).revision == f"v{VERSION}"


@pytest.mark.parametrize(
    "repo_id", ["name", "user/", "/name", "a/b/c", "user/na me", "user/name.git", "user/na--me", "../x"]
)
def test_repository_names_that_are_not_valid(folder, repo_id):
    with pytest.raises(ValueError, match="'" + repo_id):
        write_card(folder, repo_id, license="mit")
    assert not (folder / "README.md").exists()


def test_other_bad_arguments(folder, tmp_path):
    with pytest.raises(ValueError, match="'copy'"):
        write_card(folder, "user/name", license="mit", base_model_relation="copy")
    with pytest.raises(ValueError, match="'base'"):
        write_card(folder, "user/name", license="mit", base_model="base")
    with pytest.raises(FileNotFoundError, match="about.md"):
        write_card(folder, "user/name", license="mit", about=tmp_path / "about.md")
    assert not (folder / "README.md").exists()


def test_changed_code_is_refused(folder):
    (folder / "stts_loss.py").write_text("import os\n")
    with pytest.raises(ValueError, match="code files of .* are not those of the installed release"):
        write_card(folder, "user/name", license="mit")


def test_a_folder_without_a_card_or_with_another_one(folder):
    with pytest.raises(FileNotFoundError, match="no model card"):
        pinned_revision(folder)
    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match="no snippet with a pinned revision"):
        pinned_revision(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hardware": ""}, "hardware.*non-empty str"),
        ({"rows": []}, "rows.*non-empty list"),
        ({"rows": [{"accuracy": 0.5}]}, "prune_ratio"),
        ({"rows": [{"prune_ratio": 1.0}]}, "0 <= prune_ratio < 1, got 1.0"),
        ({"rows": [{"prune_ratio": 0.5, "accuracy": 98.1}]}, "from 0 to 1, got 98.1"),
        ({"date": 2026}, "date.*2026"),
        ({"note": "x"}, "with the fields name, dataset, rows, hardware, date, command and no others"),
    ],
)
def test_bad_results(tmp_path, change, words):
    (tmp_path / "results.json").write_text(json.dumps({**RESULTS, **change}))
    with pytest.raises(ValueError, match=f"results.json.*{words}"):
        read_results(tmp_path / "results.json")


def test_results_that_are_not_json(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="results.json is not JSON"):
        read_results(tmp_path / "results.json")
