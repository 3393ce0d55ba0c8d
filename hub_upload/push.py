"""Publishes a checked hub folder: first a plan of what will change, then one commit, then a download to compare."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, ModelCard, RepoFile, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from huggingface_hub.utils.sha import git_hash

from modeling_stts.stts_release import VERSION

from .card import check_repo_id, check_revision, pinned_revision
from .check import report_path
from .folder import file_hash, file_hashes, folder_hash, may_be_published


MAIN = "main"
MESSAGE = f"Publish a checkpoint of modeling-stts {VERSION}"
CONFLICTS = {
    409: "Somebody else made it since the push was planned",
    412: "The repository changed since the push was planned",
}


class Target(NamedTuple):
    """
    Where and how a folder is published.

    repo_id (`str`): repository, as `"user/name"`.
    public (`bool`): whether a repository that is made can be seen by everybody; one that exists stays as it is.
    branch (`str`): branch to commit to; it is made from `main` if it does not exist.
    tag (`str`, *optional*): tag to give the commit, a new one.
    pull_request (`bool`): whether to open a pull request on `main` instead of committing to a branch.
    message (`str`): first line of the commit.
    """

    repo_id: str
    public: bool = False
    branch: str = MAIN
    tag: str | None = None
    pull_request: bool = False
    message: str = MESSAGE


class PushPlan(NamedTuple):
    """
    What `push` will do.

    folder (`Path`): the folder. hashes (`dict[str, str]`): SHA-256 of its files by name, as they were checked.
    target (`Target`): where it goes. user (`str`): whose token is used.
    parent (`str`, *optional*): commit that the changes are based on; `None` if the repository does not exist.
    is_public (`bool`): whether everybody can see the repository.
    makes_branch (`bool`): whether the branch does not exist.
    added, changed, unchanged (`list[str]`): names of files of the folder.
    left_alone (`list[str]`): names of files that only the repository has.
    """

    folder: Path
    hashes: dict[str, str]
    target: Target
    user: str
    parent: str | None
    is_public: bool
    makes_branch: bool
    added: list[str]
    changed: list[str]
    unchanged: list[str]
    left_alone: list[str]

    def to_text(self) -> str:
        """The plan as lines for people."""
        target, size = self.target, sum((self.folder / name).stat().st_size for name in self.added + self.changed)
        where = "a new pull request" if target.pull_request else f"branch {target.branch}"
        state = f"{'public' if self.is_public else 'private'}, {'to be made' if self.parent is None else 'exists'}"
        lines = [
            f"{target.repo_id} ({state}), {where}, as {self.user}",
            *(f"  add     {name}" for name in self.added),
            *(f"  change  {name}" for name in self.changed),
            f"{len(self.added)} files to add, {len(self.changed)} to change, {size:,} bytes.",
            f"{len(self.unchanged)} stay as they are, {len(self.left_alone)} others are left alone, none is deleted.",
        ]
        return "\n".join([*lines, *([] if target.tag is None else [f"The commit gets the tag {target.tag}."])])


class Remote(NamedTuple):
    """What is known of a repository: see `PushPlan`; `files` by name."""

    parent: str | None
    is_public: bool
    makes_branch: bool
    files: dict[str, RepoFile]


class PushResult(NamedTuple):
    """
    commit (`str`): id of the commit that holds the folder. url (`str`): its page, or that of the pull request.
    revision (`str`): what was downloaded again and equals the folder: the commit, or the pull request's reference.
    """

    commit: str
    url: str
    revision: str


def plan_push(folder: str | os.PathLike, target: Target) -> PushPlan:
    """
    Looks what publishing a folder would change. Nothing is written.

    Args:
        folder (`str` or `os.PathLike`): a hub folder that passed `check`, unchanged since.
        target (`Target`): where it shall go. The snippet of its card must load from there.

    Raises:
        FileNotFoundError: if the folder, its card or its report does not exist.
        ValueError: if the folder is not as it was checked, the target is not valid or does not fit the card or the
            repository, the Hub does not accept the card, or there is no token.
        OSError: if the token is not accepted or the Hub cannot be reached.
    """
    folder = Path(folder).absolute()
    check_repo_id(target.repo_id)
    for revision in (target.branch, target.tag):
        if revision is not None:
            check_revision(revision)
    hashes = file_hashes(folder)
    _check_report(folder, hashes)
    _check_pin(folder, target)
    token = get_token()
    if token is None:
        raise ValueError("No token: log in with `hf auth login` or set HF_TOKEN to a token that may write.")
    api = HfApi(token=token)
    with _plain_errors("Nothing was changed"):
        user = api.whoami()["name"]
        remote = _look(api, target)
        _check_card(folder)
    _check_left_alone(target, remote.files.keys() - hashes.keys())
    known = [name for name in hashes if name in remote.files]
    unchanged = [name for name in known if _is_same(folder / name, hashes[name], remote.files[name])]
    return PushPlan(
        folder=folder,
        hashes=hashes,
        target=target,
        user=user,
        parent=remote.parent,
        is_public=remote.is_public,
        makes_branch=remote.makes_branch,
        added=[name for name in hashes if name not in remote.files],
        changed=[name for name in known if name not in unchanged],
        unchanged=unchanged,
        left_alone=sorted(remote.files.keys() - hashes.keys()),
    )


def push(plan: PushPlan) -> PushResult:
    """
    Publishes a folder as planned, in one commit, and downloads the commit again to compare it with the folder.

    Files that are already in the repository or were uploaded by an interrupted push do not travel again. Nothing is
    deleted. A tag is made last, so what carries it was compared.

    Args:
        plan (`PushPlan`): what `plan_push` returned.

    Raises:
        ValueError: if the folder changed since.
        OSError: if the repository changed since, the Hub fails, or what it holds differs from the folder.
    """
    target, api = plan.target, HfApi(token=get_token())
    if file_hashes(plan.folder) != plan.hashes:
        raise ValueError(f"{plan.folder} changed since the push was planned; check it again.")
    with _plain_errors("Nothing was committed; what was uploaded is used by the next push"):
        parent = plan.parent or _create_repository(api, target)
        if plan.makes_branch:
            api.create_branch(target.repo_id, branch=target.branch, revision=parent)
        commit = api.upload_folder(
            repo_id=target.repo_id,
            folder_path=plan.folder,
            allow_patterns=list(plan.hashes),
            commit_message=target.message,
            revision=MAIN if target.pull_request else target.branch,
            create_pr=target.pull_request,
            parent_commit=parent,
        )
    result = PushResult(commit.oid, commit.pr_url or commit.commit_url, commit.pr_revision or commit.oid)
    with _plain_errors(f"The commit {commit.oid} was made; push again to compare and tag it"):
        _compare(api, plan, result.revision)
        if target.tag is not None:
            api.create_tag(target.repo_id, tag=target.tag, revision=commit.oid)
    return result


def _check_report(folder: Path, hashes: dict[str, str]) -> None:
    path = report_path(folder)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} was not checked: there is no report {path}. Run `check` first.")
    try:
        report = json.loads(path.read_bytes())
        seen = (report["passed"], report["version"], report["folder_hash"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a report of `check`.") from error
    if seen != (True, VERSION, folder_hash(hashes)):
        raise ValueError(f"{folder} did not pass `check` of version {VERSION} as it is now. Run `check` again.")


def _check_pin(folder: Path, target: Target) -> None:
    pin = pinned_revision(folder)
    revisions = (target.branch, target.tag)
    if pin.repo_id != target.repo_id:
        raise ValueError(f"The card's snippet loads {pin.repo_id}, not {target.repo_id}. Write the card again.")
    if target.pull_request and (target.branch, target.tag) != (MAIN, None):
        raise ValueError("A pull request goes to main and has no tag: give neither a branch nor a tag with it.")
    # What a pull request is merged into gets its tag afterwards.
    if not target.pull_request and pin.revision not in revisions:
        raise ValueError(
            f"The card's snippet pins revision {pin.revision!r}, which this push does not make. Give it as the tag, "
            f"or write the card again."
        )


def _look(api: HfApi, target: Target) -> Remote:
    try:
        info = api.model_info(target.repo_id)
    except RepositoryNotFoundError:
        if target.pull_request:
            raise ValueError(f"{target.repo_id} does not exist, so no pull request can be opened on it.") from None
        return Remote(None, target.public, target.branch != MAIN, {})
    if target.public and info.private:
        raise ValueError(f"{target.repo_id} exists and is private. Make it public on the Hub, or push without public.")
    refs = api.list_repo_refs(target.repo_id)
    if target.tag in [ref.name for ref in refs.tags]:
        raise ValueError(f"{target.repo_id} already has the tag {target.tag!r}. Tags are never moved: give a new one.")
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    makes_branch = target.branch not in heads
    parent = heads[MAIN if makes_branch else target.branch]
    entries = api.list_repo_tree(target.repo_id, recursive=True, revision=parent)
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    return Remote(parent, not info.private, makes_branch, files)


def _check_card(folder: Path) -> None:
    """Asks the Hub, which knows what licenses there are, before anything is made in it."""
    try:
        ModelCard.load(folder / "README.md").validate()
    except ValueError as error:
        raise ValueError(f"The Hub does not accept README.md: {error}") from error


def _check_left_alone(target: Target, names: set[str]) -> None:
    """Who loads a model gets what is there, such as one weight file of old rather than several new ones."""
    mixed = sorted(
        name
        for name in names
        if (may_be_published(name) and name != "LICENSE")
        or (name.endswith(".py") and "/" not in name)
        or name == "adapter_config.json"
    )
    if mixed:
        raise ValueError(
            f"{target.repo_id} holds {', '.join(mixed)}, which would be loaded or counted as code together with the "
            f"folder. A push deletes nothing: delete it on the Hub first, or push to a new repository."
        )


def _is_same(path: Path, sha256: str, remote: RepoFile) -> bool:
    if remote.lfs is not None:
        return sha256 == remote.lfs.sha256
    return remote.size == path.stat().st_size and git_hash(path.read_bytes()) == remote.blob_id


def _create_repository(api: HfApi, target: Target) -> str:
    api.create_repo(target.repo_id, private=not target.public)
    return api.model_info(target.repo_id).sha


def _compare(api: HfApi, plan: PushPlan, revision: str) -> None:
    # Beside the folder, where there is room for one of its size.
    with tempfile.TemporaryDirectory(prefix=f".{plan.folder.name}.", dir=plan.folder.parent) as cache:
        names = list(plan.hashes)
        got = Path(
            api.snapshot_download(plan.target.repo_id, revision=revision, cache_dir=cache, allow_patterns=names)
        )
        wrong = [name for name in names if not (got / name).is_file() or file_hash(got / name) != plan.hashes[name]]
    if wrong:
        raise OSError(f"What the Hub holds at {revision} differs from the folder: {', '.join(wrong)}")


@contextmanager
def _plain_errors(state: str) -> Iterator[None]:
    """Turns whatever the Hub's client raises into an `OSError` that ends with the state things are left in."""
    try:
        yield
    except (HfHubHTTPError, httpx.HTTPError, RuntimeError) as error:
        # The client says which file failed in an error of its own, and how in the cause.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        words = " ".join(f"{error} {cause if cause is not error else ''}".split()).rstrip(".")
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        reason = CONFLICTS.get(status, "The Hub failed")
        raise OSError(f"{reason}: {words}. {state}.") from error


__all__ = ["PushPlan", "PushResult", "Target", "plan_push", "push"]
