"""Checks a hub folder as a stranger would meet it, and reports to people and programs."""

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, get_local_safetensors_metadata
from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open

from modeling_stts import Molmo2SttsConfig
from modeling_stts.stts_release import VERSION, code_file_hashes, code_hash

from . import stranger
from .card import PIPELINE_TAG, pinned_revision
from .folder import PACKAGE, file_hashes, folder_hash, list_files, write_text
from .weight_files import is_finite


ALLOWED_PACKAGES = frozenset(["torch", "torchvision", "transformers", "huggingface_hub", "numpy", "av"])
FORBIDDEN_MODULES = tuple(
    "asyncio builtins code codeop concurrent.futures ctypes ftplib http imaplib importlib marshal multiprocessing "
    "nntplib pickle poplib pty runpy smtplib socket socketserver ssl subprocess telnetlib torch.hub "
    "torch.multiprocessing torch.utils.cpp_extension urllib webbrowser wsgiref xmlrpc".split()
)
FORBIDDEN_CALLS = frozenset(["__import__", "compile", "eval", "exec"])
CODE_FIELDS = ("auto_map", "custom_pipelines")
# The star imports them all.
PROCESS_CALLS = ("*", "exec", "fork", "popen", "posix_spawn", "spawn", "startfile", "system")
NOT_RUN = "not run, because something above failed"


class Finding(NamedTuple):
    """
    name (`str`): what was looked at.
    passed (`bool`): whether it is as it must be.
    message (`str`): what was seen, or what is wrong and where.
    """

    name: str
    passed: bool
    message: str


class CheckReport(NamedTuple):
    """
    folder_hash (`str`): hash of the names and bytes of all files, by which `push` knows the folder again.
    version (`str`): version of this package.
    findings (`list[Finding]`): one for each thing that was looked at.
    """

    folder_hash: str
    version: str
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        """Whether the folder may be published."""
        return all(finding.passed for finding in self.findings)

    def to_text(self) -> str:
        """The report as lines for people."""
        lines = [f"{'ok  ' if found.passed else 'FAIL'}  {found.name}: {found.message}" for found in self.findings]
        return "\n".join([*lines, "passed" if self.passed else "NOT passed"])

    def to_json(self) -> str:
        """The report as JSON."""
        findings = [finding._asdict() for finding in self.findings]
        return json.dumps({**self._asdict(), "passed": self.passed, "findings": findings}, indent=2) + "\n"


def report_path(folder: str | os.PathLike) -> Path:
    """Where the report of a folder stands: beside it, as `<folder>.check.json`."""
    folder = Path(folder).absolute()
    return folder.with_name(folder.name + ".check.json")


def check(folder: str | os.PathLike) -> CheckReport:
    """
    Checks a hub folder and writes the report beside it (`report_path`). The folder itself is only read.

    Its code runs, in a fresh process, only if it is that of the installed release.

    Args:
        folder (`str` or `os.PathLike`): a hub folder with a model card.

    Returns:
        `CheckReport`: what was found.

    Raises:
        FileNotFoundError: if the folder does not exist or has no weights.
        ValueError: if it holds something that is not a file of the allow-list, such as a link.
    """
    folder = Path(folder).absolute()
    hashes = file_hashes(folder)
    checks = {"files": _check_files, "configuration": _check_config, "code": _check_code, "weights": _check_weights}
    findings = [_finding(name, look, folder) for name, look in checks.items()]
    runs = all(finding.passed for finding in findings)
    findings.append(_finding("card", _check_card, folder))
    if runs:
        findings += _run_as_a_stranger(folder)
    else:
        findings += [Finding(name, False, NOT_RUN) for name in stranger.STEPS]
    if file_hashes(folder) != hashes:
        raise ValueError(f"{folder} changed while it was checked; check it again.")
    report = CheckReport(folder_hash(hashes), VERSION, findings)
    write_text(report_path(folder), report.to_json())
    return report


def _finding(name: str, look: Callable[[Path], str], folder: Path) -> Finding:
    try:
        return Finding(name, True, look(folder))
    except Exception as error:  # a broken folder breaks its readers in ways that cannot be listed
        return Finding(name, False, " ".join(str(error).split()) or type(error).__name__)


def _check_files(folder: Path) -> str:
    sizes = {path.name: path.stat().st_size for path in list_files(folder)}
    for name, size in sizes.items():
        if size > MAX_HTTP_DOWNLOAD_SIZE:
            raise ValueError(f"{name} has more than {MAX_HTTP_DOWNLOAD_SIZE:,} bytes")
    return f"{len(sizes)} files, {sum(sizes.values()):,} bytes"


def _check_config(folder: Path) -> str:
    release = json.loads((folder / "config.json").read_bytes()).get("stts_release") or {}
    if (release.get("version"), release.get("code_hash")) != (VERSION, code_hash(PACKAGE)):
        raise ValueError(f"config.json was not written by the installed release {VERSION}: it says {release}")
    config = Molmo2SttsConfig.from_pretrained(folder)
    return f"valid; prune ratio {config.stts_config.prune_ratio:g} by default, version {VERSION}"


def _check_code(folder: Path) -> str:
    found, expected = code_file_hashes(folder), code_file_hashes(PACKAGE)
    changed = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if changed:
        raise ValueError(f"not those of the installed release {VERSION}: {', '.join(changed)}")
    for name in found:
        problems = find_forbidden((folder / name).read_text(encoding="utf-8"))
        if problems:
            raise ValueError(f"{name} {problems[0]}")
    for path in sorted(folder.glob("*.json")):
        _check_code_references(path)
    return f"{len(found)} files, exactly those of release {VERSION}"


def _check_code_references(path: Path) -> None:
    """Of code in another repository, named as `repo--module.Class`, nothing is known, and it could change any day."""

    def look(fields: dict[str, Any]) -> dict[str, Any]:
        for name in CODE_FIELDS:
            if "--" in json.dumps(fields.get(name)):
                raise ValueError(f"{path.name}: `{name}` names code of another repository: {fields[name]}")
        return fields

    try:
        json.loads(path.read_bytes(), object_hook=look)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error


def find_forbidden(code: str) -> list[str]:
    """
    What a code file has that remote code may not have, found without running it.

    Args:
        code (`str`): text of a Python file.

    Returns:
        `list[str]`: such as `"line 3 imports subprocess"`; empty if nothing is wrong.
    """
    problems = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [
                f"os as {alias.asname}" if alias.name == "os" and alias.asname else alias.name for alias in node.names
            ]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        problems += [f"line {node.lineno} imports {name}" for name in names if not _may_be_imported(name)]
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_CALLS:
            problems.append(f"line {node.lineno} uses {node.id}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            if _starts_a_process(f"os.{node.attr}"):
                problems.append(f"line {node.lineno} uses os.{node.attr}")
    return problems


def _may_be_imported(name: str) -> bool:
    root = name.partition(".")[0]
    is_public = not root.startswith("_") or root == "__future__"
    is_known = root in ALLOWED_PACKAGES or (root in sys.stdlib_module_names and is_public)
    is_forbidden = any(f"{name}.".startswith(f"{module}.") for module in FORBIDDEN_MODULES)
    return is_known and not is_forbidden and not _starts_a_process(name)


def _starts_a_process(name: str) -> bool:
    return name.startswith(tuple(f"os.{call}" for call in PROCESS_CALLS))


def _check_weights(folder: Path) -> str:
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_bytes())["weight_map"] if index.is_file() else None
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    expected = ["model.safetensors"] if weight_map is None else sorted(set(weight_map.values()))
    if names != expected:
        missing, extra = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
        raise ValueError(f"weight files that are missing: {missing}; that do not belong there: {extra}")
    for name in tqdm(names, desc="Weights", unit="file"):
        _check_weight_file(folder / name, weight_map)
    counts = get_local_safetensors_metadata(folder).parameter_count
    return ", ".join(f"{count:,} parameters in {dtype}" for dtype, count in sorted(counts.items())) + ", all finite"


def _check_weight_file(path: Path, weight_map: dict[str, str] | None) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            if weight_map is not None and keys != {key for key, name in weight_map.items() if name == path.name}:
                raise ValueError(f"{path.name} does not hold the weights that the index says")
            for key in sorted(keys):
                if not is_finite(file.get_tensor(key)):
                    raise ValueError(f"{path.name}: {key} has values that are not finite (NaN or infinite)")
    except SafetensorError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error


def _check_card(folder: Path) -> str:
    pin = pinned_revision(folder)
    card = ModelCard.load(folder / "README.md")
    fields = card.data.to_dict()
    wanted = {"pipeline_tag": PIPELINE_TAG, "library_name": "transformers"}
    for name, value in wanted.items():
        if fields.get(name) != value:
            raise ValueError(f"README.md: `{name}` must be {value!r}, got {fields.get(name)!r}")
    if not fields.get("license"):
        raise ValueError("README.md: `license` is missing")
    hashes = code_file_hashes(folder)
    for line in [code_hash(folder), *(f"{digest}  {name}" for name, digest in hashes.items())]:
        if line not in card.text:
            raise ValueError(f"README.md does not list the code hash {line}")
    return f"valid metadata; its snippet loads {pin.repo_id} at {pin.revision}"


def _run_as_a_stranger(folder: Path) -> list[Finding]:
    script = Path(stranger.__file__).read_text(encoding="utf-8")
    # Beside the folder, where there is room for one of its size.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        # By its text: started by its path, it would find this package's other files first when it imports.
        blocker = "import sys; sys.modules['modeling_stts'] = None\n"
        command = [sys.executable, "-c", blocker + script, str(folder), scratch]
        with open(Path(scratch) / "stderr", "w+", encoding="utf-8") as stderr:
            with subprocess.Popen(
                command, cwd=scratch, env=_bare_environment(scratch), stdout=subprocess.PIPE, stderr=stderr, text=True
            ) as process:
                lines = list(tqdm(process.stdout, desc="Loads", total=len(stranger.STEPS), unit="step"))
            stderr.seek(0)
            end = stderr.read().strip().splitlines()[-1:]
    findings = [Finding(**json.loads(line)) for line in lines if line.startswith("{")]
    unfinished = [name for name in stranger.STEPS if name not in {finding.name for finding in findings}]
    return findings + [Finding(name, False, f"the process ended before: {' '.join(end)}") for name in unfinished]


def _bare_environment(scratch: str) -> dict[str, str]:
    private = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    return {
        **kept,
        "HF_HOME": str(Path(scratch) / "home"),
        "HF_MODULES_CACHE": str(Path(scratch) / "modules"),
        "HF_HUB_OFFLINE": "1",
    }


__all__ = ["CheckReport", "Finding", "check", "find_forbidden", "report_path"]
