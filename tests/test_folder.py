import shutil
from pathlib import Path

import pytest

from hub_upload.folder import file_hashes, folder_hash, list_files, may_be_published, write_text


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "trainer_state.json",
        "events.out.tfevents.1",
        "train.log",
        ".env",
        "token",
        "model.bin",
        "pytorch_model.bin",
        "__init__.py",
        "other.py",
        "model-1-of-2.safetensors",
        "adapter_model.safetensors",
    ],
)
def test_what_is_not_on_the_allow_list(copy, name):
    (copy / name).write_text("secret")
    assert not may_be_published(name)
    with pytest.raises(ValueError, match=f"{name} is not on the allow-list"):
        list_files(copy)


@pytest.mark.parametrize("name", ["README.md", "model-00001-of-00002.safetensors", "stts_scorer.py", "config.json"])
def test_what_is_on_the_allow_list(name):
    assert may_be_published(name)


def test_links_and_folders_are_refused(copy, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (copy / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"LICENSE is a symbolic link to {tmp_path / 'secret'}"):
        list_files(copy)
    (copy / "LICENSE").unlink()
    (copy / "LICENSE").mkdir()
    with pytest.raises(ValueError, match="LICENSE is not a regular file"):
        list_files(copy)


def test_a_folder_that_does_not_exist_or_has_no_weights(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not an existing folder"):
        list_files(tmp_path / "nowhere")
    (copy / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="copy has no weights"):
        list_files(copy)


def test_the_hash_sees_names_and_bytes(copy, tiny_folder):
    before = folder_hash(file_hashes(copy))
    assert before == folder_hash(file_hashes(tiny_folder))
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    changed = folder_hash(file_hashes(copy))
    (copy / "config.json").rename(copy / "vocab.json")
    assert len({before, changed, folder_hash(file_hashes(copy))}) == 3


def test_text_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "text"
    write_text(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
