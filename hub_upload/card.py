"""
Writes the model card of a hub folder. Facts come from its configuration, its weights and result files.

A result file is JSON. All its fields are needed; rows of one file should have the same columns:

    {
        "name": "Video-MME, short videos, 32 frames",    what was measured
        "dataset": "lmms-lab/Video-MME",                 dataset repository, or a name
        "rows": [                                        one or more, shown in this order
            {"prune_ratio": 0.0, "accuracy": 0.712, "speedup": 1.0},
            {"prune_ratio": 0.5, "accuracy": 0.705, "speedup": 1.99, "prefill_ms": 158}
        ],
        "hardware": "1 x H100 80GB, bfloat16",
        "date": "2026-11-24",
        "command": "python examples/measure.py --frames 32"
    }

In a row `prune_ratio` is needed (0 <= prune_ratio < 1); `accuracy` is the fraction of right answers (0 to 1) and goes
into the metadata too; `speedup` is how many times as fast as without pruning; other columns are shown as they are.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData, get_local_safetensors_metadata
from huggingface_hub.utils import validate_repo_id

from modeling_stts import Molmo2SttsConfig
from modeling_stts.configuration_stts import check_prune_ratio
from modeling_stts.stts_release import VERSION, code_file_hashes, code_hash

from .folder import PACKAGE, list_files, write_text


PIPELINE_TAG = "video-text-to-text"
RELATIONS = ("finetune", "merge", "quantized", "adapter")
FIELDS = {"name": str, "dataset": str, "rows": list, "hardware": str, "date": str, "command": str}
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
REVISION = re.compile(r"\w[\w./+-]*", re.ASCII)
PINNED = re.compile(r'^repo_id, revision = "([^"]+)", "([^"]+)"$', re.MULTILINE)

SNIPPET = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

repo_id, revision = "{repo_id}", "{revision}"
model = AutoModelForImageTextToText.from_pretrained(repo_id, revision=revision, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo_id, revision=revision, trust_remote_code=True)
content = [{{"type": "video", "path": "clip.mp4"}}, {{"type": "text", "text": "What happens in this video?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    tokenize=True,
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=32, prune_ratio={prune_ratio})
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

CARD = """\
---
{metadata}
---

# {title}
{about}
Molmo2 with [STTS](https://arxiv.org/abs/2603.18004) (Spatio-Temporal Token Scoring): a fraction of a video's tokens is
removed inside the vision tower, and so in the language model too. It loads with plain transformers.

| | |
|---|---|
{facts}

## Use

Needs transformers{transformers}, torch, torchvision and av, and a video `clip.mp4`.

```python
{snippet}
```

`prune_ratio` is the fraction of a video's tokens that is **removed**, over the whole video: 0 is off and equals native
Molmo2. It can be given per call, also to
`pipeline("video-text-to-text", model=repo_id, revision=revision, trust_remote_code=True)`.

## Measured

{results}

## Limitations

- The first frame of a video is never pruned, and images never are.
- Tokens are removed without looking at the question: small text, pointing and counting may suffer first.
- The limits of the base model hold here too.

## Verify the code

Loading runs the code files of this repository. They are those of release {version} of the package `modeling-stts`.
`export LC_ALL=C; sha256sum *.py | sha256sum` must print the code hash above, and `sha256sum *.py` this:

```
{hashes}
```

## Citation

```bibtex
@misc{{zhang2026stts,
  title = {{Unified Spatio-Temporal Token Scoring for Efficient Video VLMs}},
  author = {{Jianrui Zhang and Yue Yang and Rohun Tripathi and Winson Han and Ranjay Krishna and Christopher Clark and
    Yong Jae Lee and Sangho Lee}},
  year = {{2026}},
  eprint = {{2603.18004}},
  archivePrefix = {{arXiv}},
  url = {{https://arxiv.org/abs/2603.18004}}
}}
```
"""


class Results(NamedTuple):
    """One result file; the module's docstring says what each field is."""

    name: str
    dataset: str
    rows: list[dict[str, Any]]
    hardware: str
    date: str
    command: str


class Pin(NamedTuple):
    """Where the snippet of a card loads from: a repository and a revision of it."""

    repo_id: str
    revision: str


def write_card(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    license: str,
    revision: str = f"v{VERSION}",
    base_model: str | None = None,
    base_model_relation: str = "finetune",
    datasets: Sequence[str] = (),
    results: Sequence[str | os.PathLike] = (),
    about: str | os.PathLike | None = None,
) -> Path:
    """
    Writes README.md into a hub folder, in place of one that is there.

    Args:
        folder (`str` or `os.PathLike`): a hub folder that `build` or `convert` made, or one saved after fine-tuning.
        repo_id (`str`): repository in which the folder will be published, as `"user/name"`.
        license (`str`): license of the weights by its Hub identifier, such as `"apache-2.0"`.
        revision (`str`, *optional*, defaults to `v` and the version): tag or branch that the snippet pins.
        base_model (`str`, *optional*): repository of the model that this one was made from.
        base_model_relation (`str`, *optional*, defaults to `"finetune"`): one of `RELATIONS`.
        datasets (`Sequence[str]`, *optional*): dataset repositories that it was trained on.
        results (`Sequence[str | os.PathLike]`, *optional*): result files; the module's docstring has their format.
        about (`str` or `os.PathLike`, *optional*): Markdown file with text to stand under the title.

    Returns:
        `Path`: the card.

    Raises:
        FileNotFoundError: if a file or the weights do not exist.
        ValueError: if a name or a result file is not valid, or the folder's code is not that of the installed release.
    """
    folder = Path(folder)
    _check_folder(folder)
    if base_model_relation not in RELATIONS:
        raise ValueError(f"`base_model_relation` must be one of {RELATIONS}, got {base_model_relation!r}.")
    for name in [repo_id, *datasets, *([] if base_model is None else [base_model])]:
        check_repo_id(name)
    check_revision(revision)
    config = Molmo2SttsConfig.from_pretrained(folder)
    measured = [read_results(path) for path in results]
    metadata = ModelCardData(
        pipeline_tag=PIPELINE_TAG,
        library_name="transformers",
        license=license,
        base_model=base_model,
        base_model_relation=None if base_model is None else base_model_relation,
        datasets=list(datasets) or None,
        tags=["stts", "token-pruning", "custom_code"],
        **_model_index(repo_id, measured),
    )
    text = CARD.format(
        metadata=metadata.to_yaml(),
        title=repo_id.partition("/")[2],
        about="" if about is None else "\n" + Path(about).read_text(encoding="utf-8").strip() + "\n",
        facts=_facts(folder, config),
        transformers=config.stts_release["transformers"],
        snippet=SNIPPET.format(repo_id=repo_id, revision=revision, prune_ratio=config.stts_config.prune_ratio),
        results=_tables(measured),
        version=VERSION,
        hashes="\n".join(f"{digest}  {name}" for name, digest in code_file_hashes(folder).items()),
    )
    write_text(folder / "README.md", text)
    return folder / "README.md"


def _check_folder(folder: Path) -> None:
    list_files(folder)
    if code_file_hashes(folder) != code_file_hashes(PACKAGE):
        raise ValueError(
            f"The code files of {folder} are not those of the installed release {VERSION}; build it again."
        )


def check_repo_id(repo_id: str) -> None:
    """
    Checks the name of a repository.

    Raises:
        ValueError: if it is not of the form `"user/name"` or not valid on the Hub.
    """
    if REPO_ID.fullmatch(repo_id) is None:
        raise ValueError(f"{repo_id!r} is not a repository name; it must have the form user/name.")
    validate_repo_id(repo_id)


def check_revision(revision: str) -> None:
    """Raises a `ValueError` if a text is not the name of a branch or tag."""
    if REVISION.fullmatch(revision) is None:
        raise ValueError(
            f"{revision!r} is not the name of a branch or tag; it must begin with a letter or digit and hold only "
            f"letters, digits and . _ - + /"
        )


def pinned_revision(folder: str | os.PathLike) -> Pin:
    """
    Where the snippet of a folder's card loads from.

    Raises:
        FileNotFoundError: if there is no card.
        ValueError: if the card has no snippet of `write_card`.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no model card (README.md); `card` writes one.")
    match = PINNED.search(path.read_text(encoding="utf-8"))
    if match is None:
        raise ValueError(f"{path} has no snippet with a pinned revision; `card` writes one.")
    return Pin(*match.groups())


def read_results(path: str | os.PathLike) -> Results:
    """
    Reads a result file.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: naming what is missing in it or out of its range.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.keys() != FIELDS.keys():
        raise ValueError(f"{path} must be a JSON object with the fields {', '.join(FIELDS)} and no others.")
    for name, kind in FIELDS.items():
        if not isinstance(content[name], kind) or not content[name]:
            raise ValueError(f"{path}: `{name}` must be a non-empty {kind.__name__}, got {content[name]!r}.")
    for row in content["rows"]:
        _check_row(path, row)
    return Results(**content)


def _check_row(path: str | os.PathLike, row: dict[str, Any]) -> None:
    if not isinstance(row, dict) or "prune_ratio" not in row:
        raise ValueError(f"{path}: each row must be an object with a `prune_ratio`, got {row!r}.")
    try:
        check_prune_ratio(row["prune_ratio"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    accuracy = row.get("accuracy", 0)
    if isinstance(accuracy, bool) or not isinstance(accuracy, int | float) or not 0 <= accuracy <= 1:
        raise ValueError(f"{path}: `accuracy` is a fraction and must be a number from 0 to 1, got {accuracy!r}.")


def _model_index(repo_id: str, measured: list[Results]) -> dict[str, Any]:
    eval_results = [
        EvalResult(
            task_type=PIPELINE_TAG,
            dataset_type=results.dataset,
            dataset_name=results.name,
            # The Hub's metadata would join what has the same dataset and configuration.
            dataset_config=results.name,
            metric_type="accuracy",
            metric_name=f"accuracy at prune ratio {row['prune_ratio']:g}",
            metric_value=row["accuracy"],
        )
        for results in measured
        for row in results.rows
        if "accuracy" in row
    ]
    return {"model_name": repo_id.partition("/")[2], "eval_results": eval_results} if eval_results else {}


def _facts(folder: Path, config: Molmo2SttsConfig) -> str:
    counts = get_local_safetensors_metadata(folder).parameter_count
    stts, vit, text = config.stts_config, config.vision_config, config.text_config
    facts = {
        "parameters": ", ".join(f"{count:,} in {dtype}" for dtype, count in sorted(counts.items())),
        "vision tower": f"{vit.num_hidden_layers} blocks of size {vit.hidden_size}",
        "language model": f"{text.num_hidden_layers} layers of size {text.hidden_size}",
        "prune ratio by default": f"{stts.prune_ratio:g}",
        "what scores tokens": f"`{stts.method}`, after block {stts.score_after_layer} (from 0)",
        "positions of kept tokens": f"`{stts.position_ids}`",
        "package and version": f"modeling-stts {VERSION}",
        "code hash": f"`{code_hash(folder)}`",
    }
    return "\n".join(f"| {name} | {value} |" for name, value in facts.items())


def _tables(measured: list[Results]) -> str:
    if not measured:
        return "Neither the accuracy nor the speed of this checkpoint was measured."
    return "\n\n".join(_table(results) for results in measured)


def _table(results: Results) -> str:
    columns = list(dict.fromkeys(["prune_ratio", *(column for row in results.rows for column in row)]))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(column, row.get(column)) for column in columns] for row in results.rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    how = f"**{results.name}** ({results.dataset}), {results.hardware}, {results.date}, by `{results.command}`:"
    return f"{how}\n\n{table}"


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column == "accuracy":
        return f"{100 * value:.1f} %"
    if column == "speedup":
        return f"{value:.2f} x"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("|", "\\|")


__all__ = ["Results", "pinned_revision", "read_results", "write_card"]
