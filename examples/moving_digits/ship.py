"""Makes the hub folder that ships, `model` beside this file: weights in bfloat16, code, card; and checks it.

    python examples/moving_digits/ship.py out/stts-1/final    # weights that `reproduce.py` trained
    python examples/moving_digits/ship.py                     # the weights that are there, with today's code

The card's figures come from `results` beside this file. The old folder stays where anything fails.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import Results
from scenes import SETS

from hub_upload.build import build_hub_folder
from hub_upload.card import write_card
from hub_upload.check import check


HERE = Path(__file__).parent
FOLDER, RESULTS = HERE / "model", HERE / "results"
RULE, SEED = "stts", 1
REPO_ID, LICENSE = "modeling-stts/moving-digits", "apache-2.0"
MAX_SHARD_SIZE = "14MB"  # what many hosts of git repositories take without a word
MEASURED = {
    "hardware": "four NVIDIA H200, bfloat16, torch 2.11, transformers 5.24.0",
    "date": "2026-11-26",
    "command": "python examples/moving_digits/reproduce.py out",
}


def card_results(results: Results, name: str) -> dict[str, Any]:
    """
    What was measured on one set, in the format of `hub_upload.card`: accuracy over all kinds of questions, the mean
    that `report.py` takes, and of each kind.

    Args:
        results (`Results`): of the model that ships, and no other.
        name (`str`): the set.
    """
    rows = []
    for ratio in results.ratios():
        (row,) = results.find(RULE, name, ratio)
        kinds = {kind: round(right / total, 3) for kind, (right, total, _) in sorted(row["questions"].items())}
        accuracy = results.accuracy(RULE, name, ratio)
        rows.append({"prune_ratio": ratio, "accuracy": round(accuracy.mean / 100, 4), **kinds})
    return {"name": f"moving digits, {name} test videos", "dataset": "moving-digits", "rows": rows, **MEASURED}


def make_folder(source: Path, folder: Path) -> str:
    """
    Builds a hub folder with its card, and checks it as a stranger would.

    Args:
        source (`Path`): folder of the trained model.
        folder (`Path`): the folder to make; its parent is written to.

    Returns:
        `str`: the report of the check.

    Raises:
        ValueError: if the check finds something wrong.
    """
    build_hub_folder(folder, source, dtype="bfloat16", max_shard_size=MAX_SHARD_SIZE)
    results = Results(json.loads((RESULTS / f"{RULE}-{SEED}.json").read_text()))
    paths = [folder.with_name(f"{name}.json") for name in SETS]
    for path, name in zip(paths, SETS):
        path.write_text(json.dumps(card_results(results, name)))
    write_card(folder, REPO_ID, license=LICENSE, results=paths, about=HERE / "about_model.md")
    report = check(folder)
    if not report.passed:
        raise ValueError(report.to_text())
    return report.to_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", default=FOLDER, help="folder of a trained model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=".ship.", dir=HERE) as scratch:
        new = Path(scratch, "model")
        try:
            print(make_folder(args.source, new))
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")
        if FOLDER.exists():
            FOLDER.rename(Path(scratch, "old"))
        new.rename(FOLDER)


if __name__ == "__main__":
    main()
