"""Draws how a training of finetune.py went: the losses, accuracy, and what the scorer does.

python examples/plot_training.py OUT curve.png      # OUT is the output folder of a training or one of its checkpoints
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


# The curves of each panel: what their logged names begin with, the scale of the axis and its limits.
PANELS = {
    "loss": (("language_loss", "temporal_loss"), "log", None),
    "accuracy": (("eval_accuracy_",), "linear", (0, 1)),
    "scorer": (("kept_share", "score_mean", "score_std"), "linear", (0, 1)),
}


def label(name: str) -> str:
    """What stands beside a curve."""
    _, is_accuracy, ratio = name.partition("eval_accuracy_")
    return f"{100 * float(ratio):g} % pruned" if is_accuracy else name.replace("_", " ")


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """
    Args:
        folder (`Path`): with the state of a training.

    Returns:
        `dict[str, list[tuple[int, float]]]`: step and value of everything that was logged, by name.

    Raises:
        FileNotFoundError: if the folder has no state.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]:
        for name, value in entry.items():
            curves.setdefault(name, []).append((entry["step"], value))
    return curves


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """
    Args:
        curves (`dict`): see `read_curves`.
        path (`Path`): the picture to write.
    """
    figure = Figure(figsize=(4 * len(PANELS), 3.2), layout="constrained")
    for axes, (title, (prefixes, scale, limits)) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        shown = {name: curve for name, curve in curves.items() if name.startswith(prefixes)}
        for name, curve in shown.items():
            axes.plot(*zip(*curve), label=label(name), marker="." * (len(curve) < 30))
        axes.set(title=title, xlabel="step", yscale=scale, ylim=limits)
        if shown:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of a training, or a checkpoint")
    parser.add_argument("picture", type=Path, help="file to write")
    args = parser.parse_args()
    try:
        draw(read_curves(args.folder), args.picture)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
