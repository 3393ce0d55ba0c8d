import configparser
import json
import subprocess
from pathlib import Path

import pytest
from test_remote_code import run_in_fresh_process

import modeling_stts
from hub_upload.tiny import tiny_config
from modeling_stts import Molmo2SttsConfig
from modeling_stts.stts_release import TRANSFORMERS_RANGE, VERSION, check_transformers, code_file_hashes, code_hash


PACKAGE = Path(modeling_stts.__file__).parent


def test_setup_cfg_says_the_same():
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: modeling_stts.stts_release.VERSION"
    assert f"transformers{TRANSFORMERS_RANGE}" in setup["options"]["install_requires"].splitlines()


@pytest.mark.parametrize("version", ["5.20.0", "5.23.0", "5.99.1.dev0"])
def test_transformers_in_the_range(version, caplog):
    check_transformers(version)
    assert caplog.text == ""


def test_transformers_below_the_range():
    with pytest.raises(ImportError, match=rf"^STTS {VERSION} is made for transformers>=5.20,<6, .* 5.19.3.$"):
        check_transformers("5.19.3")


SAVE_BY_HUB_CODE = """
import json, sys
import transformers
transformers.__version__ = "6.1.0"
from transformers import AutoConfig

config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
config.save_pretrained(sys.argv[2])
print(json.dumps(config.stts_release))
"""


def test_loading_outside_the_range_says_so_in_one_line_and_saving_keeps_the_release(tiny_folder, tmp_path):
    release, stderr = run_in_fresh_process(tmp_path, SAVE_BY_HUB_CODE, tiny_folder, tmp_path / "again")
    said = [line for line in stderr.splitlines() if "STTS" in line]
    assert said == ["STTS 0.1.0 is made for transformers>=5.20,<6, and this is transformers 6.1.0."]
    expected = {"version": VERSION, "transformers": TRANSFORMERS_RANGE, "code_hash": code_hash(PACKAGE)}
    for folder in (tiny_folder, tmp_path / "again"):
        assert json.loads((folder / "config.json").read_text())["stts_release"] == expected
    assert release == expected


def test_the_running_release_replaces_a_given_one():
    config = Molmo2SttsConfig(**{**tiny_config().to_dict(), "stts_release": {"version": "0.0.1", "code_hash": "old"}})
    assert config.stts_release["version"] == VERSION and config.stts_release["code_hash"] == code_hash(PACKAGE)


def test_code_hash_is_what_sha256sum_says(tiny_folder):
    printed = subprocess.run(
        ["sh", "-c", "export LC_ALL=C; sha256sum *.py | sha256sum"], cwd=tiny_folder, capture_output=True, text=True
    ).stdout
    assert printed.split()[0] == code_hash(tiny_folder) == code_hash(PACKAGE)
    assert "__init__.py" not in code_file_hashes(PACKAGE)


def test_code_hash_sees_names_and_bytes(tmp_path):
    (tmp_path / "a.py").write_text("1")
    first = code_hash(tmp_path)
    (tmp_path / "a.py").write_text("2")
    second = code_hash(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, code_hash(tmp_path)}) == 3
