import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hub_upload.card import write_card
from hub_upload.check import CheckReport, Finding, report_path
from hub_upload.folder import file_hashes, folder_hash
from hub_upload.push import Target, plan_push, push
from modeling_stts.stts_release import VERSION


def let_pass(folder):
    """A report as `check` writes it, without the minute that a check takes."""
    report = CheckReport(folder_hash(file_hashes(folder)), VERSION, [Finding("all", True, "")])
    report_path(folder).write_text(report.to_json())


def change_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def folder(checked_folder, tmp_path):
    """A copy that may be changed, checked as it is."""
    shutil.copy(report_path(checked_folder), report_path(tmp_path / "tiny"))
    return Path(shutil.copytree(checked_folder, tmp_path / "tiny"))


@pytest.fixture
def second(folder, tmp_path):
    """The same model, trained on: other weights and a card for v2."""
    second = Path(shutil.copytree(folder, tmp_path / "second"))
    change_weights(second)
    write_card(second, "user/tiny", license="apache-2.0", revision="v2")
    let_pass(second)
    return second


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def push_it(folder, **target):
    return push(plan_push(folder, Target("user/tiny", **target)))


def test_first_push(hub, folder):
    plan = plan_push(folder, Target("user/tiny", tag="v1", message="First release"))
    assert plan.parent is None and plan.added == sorted(bytes_of(folder)) and hub.repositories == {}
    text = plan.to_text()
    assert "user/tiny (private, to be made), branch main, as user" in text and "  add     model.safetensors" in text
    assert "tag v1" in text
    result = push(plan)
    repository = hub.repositories["user/tiny"]
    assert (
        repository.private and repository.refs["refs/tags/v1"] == repository.refs["refs/heads/main"] == result.commit
    )
    assert [commit.title for commit in repository.log("main")] == ["First release", "initial commit"]
    content = hub.content("user/tiny", "v1")
    assert content.pop(".gitattributes") and content == bytes_of(folder)


def test_second_push_sends_only_what_changed_and_keeps_the_history(hub, folder, second):
    first = push_it(folder, tag="v1")
    repository = hub.repositories["user/tiny"]
    notes = {**repository.find("main").files, "NOTES.txt": hub.small(b"by hand")}
    hub.commit(repository, "refs/heads/main", "add notes by hand", notes)
    hub.received.clear()
    plan = plan_push(second, Target("user/tiny", tag="v2"))
    assert (plan.added, plan.changed) == ([], ["README.md", "model.safetensors"])
    assert plan.left_alone == [".gitattributes", "NOTES.txt"] and "2 others are left alone" in plan.to_text()
    push(plan)
    weights = file_hashes(second)["model.safetensors"]
    assert sorted(hub.received) == sorted([weights, "README.md", "model.safetensors"])
    assert hub.content("user/tiny")["NOTES.txt"] == b"by hand"
    assert bytes_of(folder).items() <= hub.content("user/tiny", "v1").items()
    assert bytes_of(second).items() <= hub.content("user/tiny", "v2").items()
    assert first.commit in [commit.oid for commit in repository.log("v2")]


def test_pushing_again_commits_nothing(hub, folder):
    push_it(folder, tag="v1")
    num_commits = len(hub.repositories["user/tiny"].commits)
    with pytest.raises(ValueError, match="already has the tag 'v1'"):
        plan_push(folder, Target("user/tiny", tag="v1"))
    write_card(folder, "user/tiny", license="apache-2.0", revision="v1")
    let_pass(folder)
    plan = plan_push(folder, Target("user/tiny", branch="v1"))
    assert plan.added == plan.changed == [] and plan.makes_branch
    push(plan)
    assert len(hub.repositories["user/tiny"].commits) == num_commits


def test_branch(hub, folder, second):
    push_it(folder, tag="v1")
    main = hub.repositories["user/tiny"].refs["refs/heads/main"]
    result = push_it(second, branch="v2")
    refs = hub.repositories["user/tiny"].refs
    assert refs["refs/heads/main"] == main and refs["refs/heads/v2"] == result.commit != main


def split_weights(folder):
    """The weights in two files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {f"model-0000{i + 1}-of-00002.safetensors": sorted(weights)[i::2] for i in range(2)}
    for name, keys in names.items():
        save_file({key: weights[key] for key in keys}, folder / name, {"format": "pt"})
    weight_map = {key: name for name, keys in names.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("stale", [None, "adapter_config.json", "modeling_old.py"])
def test_what_would_be_loaded_beside_the_folder_is_refused(hub, folder, second, stale):
    push_it(folder, tag="v1")
    repository = hub.repositories["user/tiny"]
    if stale is None:
        split_weights(second)
        let_pass(second)
    else:
        files = {**repository.find("main").files, stale: hub.small(b"{}"), "demo/run.py": hub.small(b"")}
        hub.commit(repository, "refs/heads/main", "by hand", files)
    with pytest.raises(ValueError, match=f"user/tiny holds {stale or 'model.safetensors'}, which would be loaded"):
        plan_push(second, Target("user/tiny", tag="v2"))


def test_a_card_that_the_hub_does_not_accept(hub, folder):
    write_card(folder, "user/tiny", license="mine", revision="v1")
    let_pass(folder)
    with pytest.raises(ValueError, match=r"The Hub does not accept README\.md: .*license"):
        plan_push(folder, Target("user/tiny", tag="v1"))
    assert hub.repositories == {}


def test_pull_request(hub, folder, second):
    push_it(folder, tag="v1")
    main = hub.repositories["user/tiny"].refs["refs/heads/main"]
    result = push_it(second, pull_request=True)
    refs = hub.repositories["user/tiny"].refs
    assert result.revision == "refs/pr/1" and result.url.endswith("/discussions/1")
    assert refs["refs/pr/1"] == result.commit and refs["refs/heads/main"] == main
    assert bytes_of(second).items() <= hub.content("user/tiny", "refs/pr/1").items()


def test_pull_request_of_somebody_else(hub, folder, monkeypatch):
    hub.create("user/tiny")
    monkeypatch.setenv("HF_TOKEN", "other-token")
    result = push_it(folder, pull_request=True)
    assert hub.repositories["user/tiny"].refs["refs/pr/1"] == result.commit
    with pytest.raises(OSError, match=r"The Hub failed: .*403.*Nothing was committed"):
        push_it(folder, tag="v1")


def test_pull_request_on_nothing(hub, folder):
    with pytest.raises(ValueError, match="user/tiny does not exist, so no pull request"):
        plan_push(folder, Target("user/tiny", pull_request=True))


@pytest.mark.parametrize("kind", ["500", "cut"])
def test_interrupted_push_is_resumed(hub, folder, kind):
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    change_weights(folder)
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    let_pass(folder)
    hashes = file_hashes(folder)
    first, last = hashes["model-00001-of-00002.safetensors"], hashes["model-00002-of-00002.safetensors"]
    hub.fail_next("PUT", last, kind, times=6)
    with pytest.raises(OSError, match=r"The Hub failed.*model-00002-of-00002.*Nothing was committed"):
        push_it(folder, tag="v1")
    assert hub.faults == [] and hub.received == [first]
    assert list(hub.content("user/tiny")) == [".gitattributes"]
    hub.received.clear()
    push_it(folder, tag="v1")
    assert last in hub.received and first not in hub.received
    assert bytes_of(folder).items() <= hub.content("user/tiny", "v1").items()


def test_a_short_failure_is_survived(hub, folder):
    hub.fail_next("PUT", "upload", "cut")
    hub.fail_next("POST", "preupload", "500", times=2)
    push_it(folder, tag="v1")
    assert hub.faults == [] and bytes_of(folder).items() <= hub.content("user/tiny", "v1").items()


@pytest.mark.parametrize("kind", ["500", "cut"])
@pytest.mark.parametrize(
    "method, pattern, words, makes",
    [
        ("GET", "whoami", "Nothing was changed", False),
        ("POST", "repos/create", "Nothing was committed", False),
        ("POST", "/commit/", "Nothing was committed", True),
    ],
)
def test_failures_leave_nothing_half_done(hub, folder, kind, method, pattern, words, makes):
    before = bytes_of(folder)
    hub.fail_next(method, pattern, kind)
    with pytest.raises(OSError, match=rf"The Hub failed: .*{words}"):
        push_it(folder, tag="v1")
    assert bytes_of(folder) == before
    assert list(hub.repositories) == (["user/tiny"] if makes else [])
    assert not makes or list(hub.content("user/tiny")) == [".gitattributes"]
    push_it(folder, tag="v1")
    assert before.items() <= hub.content("user/tiny", "v1").items()


def test_what_the_hub_holds_is_compared(hub, folder):
    plan = plan_push(folder, Target("user/tiny", tag="v1"))
    size = (folder / "model.safetensors").stat().st_size
    hub.path(plan.hashes["model.safetensors"]).write_bytes(b"\0" * size)
    with pytest.raises(OSError, match=r"differs from the folder: model\.safetensors"):
        push(plan)
    assert "refs/tags/v1" not in hub.repositories["user/tiny"].refs


def test_a_push_that_could_not_compare_is_finished_by_the_next(hub, folder):
    hub.fail_next("GET", "resolve/.*/model.safetensors", "500", times=100)
    with pytest.raises(OSError, match=r"The Hub failed: .*The commit \w+ was made; push again to compare and tag it"):
        push_it(folder, tag="v1")
    hub.faults.clear()
    refs = hub.repositories["user/tiny"].refs
    assert list(refs) == ["refs/heads/main"]
    plan = plan_push(folder, Target("user/tiny", tag="v1"))
    assert plan.added == plan.changed == []
    assert push(plan).commit == refs["refs/tags/v1"] == refs["refs/heads/main"]
    assert len(hub.repositories["user/tiny"].commits) == 2


def test_two_pushes_at_once(hub, folder, second):
    push_it(folder, tag="v1")
    plans = [plan_push(second, Target("user/tiny", tag="v2"))]
    write_card(folder, "user/tiny", license="mit", revision="v3")
    let_pass(folder)
    plans.append(plan_push(folder, Target("user/tiny", tag="v3")))
    outcomes = []

    def run(plan):
        try:
            outcomes.append(push(plan))
        except OSError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run, args=[plan]) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    lost = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(outcomes) == 2 and len(lost) == 1
    assert (
        lost[0].startswith("The repository changed since the push was planned") and "Nothing was committed" in lost[0]
    )
    won = next(outcome for outcome in outcomes if not isinstance(outcome, str))
    log = hub.repositories["user/tiny"].log("main")
    assert log[0].oid == won.commit and len(log) == 3


def test_a_repository_that_was_made_meanwhile(hub, folder):
    plan = plan_push(folder, Target("user/tiny", tag="v1"))
    hub.create("user/tiny")
    with pytest.raises(OSError, match="Somebody else made it since"):
        push(plan)
    assert list(hub.content("user/tiny")) == [".gitattributes"]


def test_visibility(hub, folder):
    hub.create("user/tiny", private=True)
    with pytest.raises(ValueError, match="exists and is private"):
        plan_push(folder, Target("user/tiny", tag="v1", public=True))
    assert "(private, exists)" in plan_push(folder, Target("user/tiny", tag="v1")).to_text()
    del hub.repositories["user/tiny"]
    push_it(folder, tag="v1", public=True)
    assert not hub.repositories["user/tiny"].private


@pytest.mark.parametrize("token, words", [("bad-token", "The Hub failed: .*token"), (None, "No token: log in with")])
def test_wrong_token_and_no_token(hub, folder, monkeypatch, tmp_path, token, words):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises((OSError, ValueError), match=words):
        plan_push(folder, Target("user/tiny", tag="v1"))
    assert hub.repositories == {}


def test_a_hub_that_cannot_be_reached(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "good-token")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="The Hub failed: .*Nothing was changed"):
        plan_push(folder, Target("user/tiny", tag="v1"))


@pytest.mark.parametrize("repo_id", ["tiny", "user/tiny/x", "user/ti ny", "user/tiny.git", ""])
def test_repository_names_that_are_not_valid(hub, folder, repo_id):
    with pytest.raises(ValueError, match=f"'{repo_id}'"):
        plan_push(folder, Target(repo_id, tag="v1"))
    assert hub.requests == []


def add_a_file(folder):
    (folder / "LICENSE").write_text("mine")


def fail_the_check(folder):
    report_path(folder).write_text(report_path(folder).read_text().replace('"passed": true', '"passed": false'))


def spoil_the_report(folder):
    report_path(folder).write_text("[]")


def remove_the_report(folder):
    report_path(folder).unlink()


@pytest.mark.parametrize(
    "damage, words",
    [
        (change_weights, "did not pass `check` of version .* as it is now"),
        (add_a_file, "did not pass `check`"),
        (fail_the_check, "did not pass `check`"),
        (spoil_the_report, "is not a report of `check`"),
        (remove_the_report, "was not checked: there is no report"),
        (lambda folder: (folder / ".env").write_text("TOKEN=1"), r"\.env is not on the allow-list"),
        (lambda folder: (folder / "LICENSE").symlink_to("/etc/hostname"), "symbolic link to /etc/hostname"),
    ],
)
def test_only_what_was_checked_is_pushed(hub, folder, damage, words):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        plan_push(folder, Target("user/tiny", tag="v1"))
    assert hub.requests == []


def test_a_folder_that_changed_after_the_plan(hub, folder):
    plan = plan_push(folder, Target("user/tiny", tag="v1"))
    change_weights(folder)
    with pytest.raises(ValueError, match="changed since the push was planned"):
        push(plan)
    assert hub.repositories == {}


@pytest.mark.parametrize(
    "target, words",
    [
        (Target("user/other", tag="v1"), "snippet loads user/tiny, not user/other"),
        (Target("user/tiny", tag="v2"), "pins revision 'v1', which this push does not make"),
        (Target("user/tiny"), "pins revision 'v1'"),
        (Target("user/tiny", tag="v1", pull_request=True), "neither a branch nor a tag"),
        (Target("user/tiny", tag="v1", branch="a b"), "'a b' is not the name of a branch or tag"),
        (Target("user/tiny", tag="../v1", branch="v1"), "'../v1' is not the name of a branch or tag"),
    ],
)
def test_the_card_must_fit_the_target(hub, folder, target, words):
    with pytest.raises(ValueError, match=words):
        plan_push(folder, target)
    assert hub.requests == []


LOAD = """
import json
from transformers import pipeline

first = AutoModelForImageTextToText.from_pretrained("user/tiny", revision="v1", trust_remote_code=True)
pipe = pipeline("video-text-to-text", model="user/tiny", revision="v1", trust_remote_code=True)
assert isinstance(pipe("clip.mp4", text="What happens?", max_new_tokens=2)[0]["generated_text"], str)
totals = [loaded.lm_head.weight.sum().item() for loaded in (first, pipe.model, model)]
print(json.dumps([*totals, type(first).__module__.split(".")[0]]))
"""


def run_in_a_fresh_process(hub, tmp_path, code):
    home = tmp_path / "home"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "good-token", "HF_HOME": str(home)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_MODULES_CACHE": str(home / "modules")}
    blocker = "import sys; sys.modules['modeling_stts'] = None\n"
    command = [sys.executable, "-c", blocker + code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_from_pretrained_by_name_and_revision_and_the_cards_snippet(hub, folder, second, clip, tmp_path):
    push_it(folder, tag="v1")
    push_it(second, tag="v2")
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    snippet = re.search(r"```python\n(.*?)```", hub.content("user/tiny", "v2")["README.md"].decode(), re.DOTALL)[1]
    assert 'revision = "user/tiny", "v2"' in snippet
    *totals, module = json.loads(run_in_a_fresh_process(hub, tmp_path, snippet + LOAD))
    expected = [load_file(source / "model.safetensors")["lm_head.weight"].sum().item() for source in (folder, second)]
    assert totals == pytest.approx([expected[0], *expected], rel=1e-5)
    assert module == "transformers_modules"
