"""Turns results of evaluate.py into tables, a list of claims, and a plot.

    python examples/moving_digits/report.py RESULTS.json [RESULTS.json ...] --plot accuracy.png

Accuracy is in percent: the mean over seeds, and the standard deviation between them. It is the mean of the kinds of
questions of a set, so that a kind that is asked more often does not count more. A difference is that of each seed that
both have, in points.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from conversations import LONG_SAMPLE
from evaluate import MORE_FRAMES
from matplotlib.figure import Figure
from scenes import SETS


UNPRUNED = "unpruned"
ALL_SETS = "all sets"
LEAST_SEEDS = 3  # for a verdict


def spread(values: list[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def with_spread(values: list[float], form: str) -> str:
    """Mean and, of several values, standard deviation; `form` is how the mean is written, such as `"+.2f"`."""
    mean = f"{statistics.mean(values):{form}}"
    return f"{mean} ± {spread(values):{form.lstrip('+')}}" if len(values) > 1 else mean


class Accuracy(NamedTuple):
    """
    by_seed (`dict[int, float]`): percent of right answers for each seed of the training.
    chance (`float`): percent that guessing gives.
    """

    by_seed: dict[int, float]
    chance: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.by_seed.values())

    @property
    def spread(self) -> float:
        return spread(list(self.by_seed.values()))

    def __str__(self) -> str:
        return with_spread(list(self.by_seed.values()), ".1f")


class Results:
    """
    Results of any number of models.

    Args:
        rows (`list[dict]`): what evaluate.py wrote.

    Raises:
        ValueError: if there are none, or others.
    """

    def __init__(self, rows: list[dict[str, Any]]):
        if not rows or not all(isinstance(row, dict) and "questions" in row for row in rows):
            raise ValueError("The results must have rows that evaluate.py wrote.")
        self.rows = rows

    def rules(self) -> list[str]:
        return list(dict.fromkeys(row["rule"] for row in self.rows))

    def ratios(self) -> list[float]:
        return sorted({row["ratio"] for row in self.rows if row["num_frames"] == LONG_SAMPLE})

    def find(
        self, rule: str, name: str, ratio: float, num_frames: int = LONG_SAMPLE, changes: Any = ()
    ) -> list[dict[str, Any]]:
        """
        The rows of one setting, one for each seed.

        Args:
            rule (`str`), name (`str`), ratio (`float`), num_frames (`int`): rule, set and setting.
            changes (`dict`, *optional*): fields of `SttsConfig` that were changed.
        """
        wanted = (rule, name, num_frames, dict(changes))
        return [
            row
            for row in self.rows
            if (row["rule"], row["set"], row["num_frames"], row["changes"]) == wanted
            and abs(row["ratio"] - ratio) < 1e-6
        ]

    def accuracy(self, *setting: Any, **settings: Any) -> Accuracy | None:
        """Accuracy in a setting, which `find` describes; `None` where it was not measured."""
        by_seed, chances = {}, []
        for row in self.find(*setting, **settings):
            counts = row["questions"].values()
            by_seed[row["seed"]] = 100 * statistics.mean(right / total for right, total, _ in counts)
            chances.append(100 * statistics.mean(chance / total for _, total, chance in counts))
        return Accuracy(by_seed, chances[0]) if by_seed else None

    def mean_accuracy(self, rule: str, names: Iterable[str], ratio: float) -> Accuracy | None:
        """The mean of some sets, for each seed that all of them have; `None` where one was not measured."""
        found = [self.accuracy(rule, name, ratio) for name in names]
        if None in found:
            return None
        seeds = sorted(set.intersection(*(set(accuracy.by_seed) for accuracy in found)))
        by_seed = {seed: statistics.mean(accuracy.by_seed[seed] for accuracy in found) for seed in seeds}
        return Accuracy(by_seed, statistics.mean(accuracy.chance for accuracy in found)) if by_seed else None

    def chance(self, name: str) -> float:
        """Percent of right answers that guessing gives on a set."""
        measured = (self.accuracy(rule, name, ratio) for rule in self.rules() for ratio in self.ratios())
        return next(accuracy.chance for accuracy in measured if accuracy is not None)

    def kept_share(self, rule: str, name: str, ratio: float) -> tuple[float, float] | None:
        """Percent of the windows, and of the kept ones, that touch a digit or where one was a frame before."""
        counted = [row["windows"] for row in self.find(rule, name, ratio) if row["windows"].get("kept")]
        if not counted:
            return None
        total = {key: sum(windows.get(key, 0) for windows in counted) for key in counted[0]}
        return 100 * total["touched"] / total["windows"], 100 * total["kept_touched"] / total["kept"]


class Claim(NamedTuple):
    """
    text (`str`): what is claimed.
    differences (`list[float]`): what was measured, in points, one for each seed.
    at_least (`float`): what their mean must be.
    """

    text: str
    differences: list[float]
    at_least: float

    def __str__(self) -> str:
        value = statistics.mean(self.differences)
        verdict = "as claimed" if value >= self.at_least else "not as claimed"
        if len(self.differences) < LEAST_SEEDS:
            verdict += f", but of {len(self.differences)} seeds only"
        points = with_spread(self.differences, "+.2f")
        return f"- {self.text}: {points} points ({verdict}: at least {self.at_least:+.1f})"


def differences(better: Accuracy | None, worse: Accuracy | None) -> list[float]:
    """The difference of each seed that both have; none where one was not measured."""
    if better is None or worse is None:
        return []
    seeds = sorted(better.by_seed.keys() & worse.by_seed.keys())
    return [better.by_seed[seed] - worse.by_seed[seed] for seed in seeds]


def claims(results: Results) -> list[Claim]:
    """The paper's claims, and test-time scaling of every rule, as far as they were measured."""
    found = []
    for title, names in {ALL_SETS: SETS, **{name: (name,) for name in SETS}}.items():
        pairs = [("50 % pruned against unpruned", 0.5, results.mean_accuracy(UNPRUNED, names, 0.0), -0.7)]
        for rule in ("random", "similarity", "frame pairs", "uniform stride"):
            if rule == "random":
                pairs.append((f"STTS against {rule} at 50 %", 0.5, results.mean_accuracy(rule, names, 0.5), 0.9))
            least = 2.3 if rule == "random" else 0.0
            pairs.append((f"STTS against {rule} at 80 %", 0.8, results.mean_accuracy(rule, names, 0.8), least))
        for text, ratio, other, least in pairs:
            stts = results.mean_accuracy("stts", names, ratio)
            found.append(Claim(f"{title}: {text}", differences(stts, other), least))
    unpruned = results.accuracy(UNPRUNED, "long", 0.0)
    positions = {"": {}, " at compact positions": {"position_ids": "compact"}}
    for num_frames, rule, (where, changes) in product(MORE_FRAMES, results.rules(), positions.items()):
        scaled = results.accuracy(rule, "long", 1 - LONG_SAMPLE / num_frames, num_frames, changes)
        text = f"long: {rule}, {num_frames} frames pruned to the tokens of {LONG_SAMPLE}{where}"
        found.append(Claim(f"{text}, against those unpruned", differences(scaled, unpruned), 0.5))
    return [claim for claim in found if claim.differences]


def table(results: Results, name: str) -> str:
    """One set as a Markdown table: a line for each rule, a column for each ratio."""
    ratios = results.ratios()
    lines = [f"| {name} | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |", "|---" * (len(ratios) + 1) + "|"]
    for rule in results.rules():
        cells = (results.accuracy(rule, name, ratio) for ratio in ratios)
        lines.append(f"| {rule} | " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join([*lines, f"| chance | {results.chance(name):.1f} |" + " |" * (len(ratios) - 1)])


def kinds_table(results: Results, name: str) -> str:
    """The kinds of questions of one set as a Markdown table: what guessing gives, and what STTS does."""
    settings = [(UNPRUNED, 0.0), *(("stts", ratio) for ratio in results.ratios())]
    measured = {f"{rule} {ratio:.0%}": rows for rule, ratio in settings if (rows := results.find(rule, name, ratio))}
    header = [f"{name}, by kind", "guessing", *measured]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    any_row = next(row for row in results.rows if row["set"] == name)
    for kind, (_, total, chance) in any_row["questions"].items():
        cells = [100 * chance / total]
        for rows in measured.values():
            counts = [row["questions"][kind] for row in rows]
            cells.append(statistics.mean(100 * right / asked for right, asked, _ in counts))
        lines.append(f"| {kind} ({total}) | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


def plot(results: Results, path: Path) -> None:
    """Accuracy against the prune ratio, with the spread of the seeds, a panel for each set."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, len(SETS), sharey=True)
    for panel, name in zip(panels, SETS):
        for rule in results.rules():
            found = [(100 * ratio, results.accuracy(rule, name, ratio)) for ratio in results.ratios()]
            ratios, accuracies = zip(*((ratio, accuracy) for ratio, accuracy in found if accuracy is not None))
            means, spreads = zip(*((accuracy.mean, accuracy.spread) for accuracy in accuracies))
            style = {"linewidth": 3, "zorder": 3} if rule == "stts" else {"linewidth": 1}
            panel.errorbar(ratios, means, spreads, marker="o", capsize=3, label=rule, **style)
        panel.axhline(results.chance(name), color="black", linewidth=1, linestyle=":", label="chance")
        panel.set(title=f"{name} videos", xlabel="pruned, percent")
    panels[0].set_ylabel("right answers, percent")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=100)


def changed_settings(results: Results) -> list[str]:
    """What single fields of `SttsConfig`, changed after training, do to a rule's accuracy."""
    settings = {
        (row["rule"], row["set"], row["ratio"], row["num_frames"], *row["changes"].items())
        for row in results.rows
        if row["changes"]
    }
    lines = []
    for rule, name, ratio, num_frames, *changes in sorted(settings):
        changed = results.accuracy(rule, name, ratio, num_frames, changes)
        found = differences(changed, results.accuracy(rule, name, ratio, num_frames))
        fields = ", ".join(f"{field}={value}" for field, value in changes)
        if found:
            points = f"{statistics.mean(found):+.2f} points"
            lines.append(f"- {name}: {rule} at {ratio:.0%}, {num_frames} frames, with {fields}: {points}")
    return lines


def report(results: Results) -> Iterable[str]:
    """The report as paragraphs of Markdown."""
    for name in SETS:
        yield table(results, name)
    for name in SETS:
        yield kinds_table(results, name)
    yield "\n".join(map(str, claims(results)))
    if lines := changed_settings(results):
        yield "\n".join(lines)
    for name in SETS:
        unpruned = results.accuracy(UNPRUNED, name, 0.0)
        if unpruned is not None and unpruned.mean <= unpruned.chance:
            yield f"{name}: the unpruned model only guesses, so nothing that is said of this set means anything."
    for name in SETS:
        found = {rule: results.kept_share(rule, name, 0.8) for rule in results.rules()}
        kept = [f"{rule} {shares[1]:.0f} %" for rule, shares in found.items() if shares is not None]
        if kept:
            everywhere = next(shares[0] for shares in found.values() if shares is not None)
            lines = f"{name}, 80 % pruned: {everywhere:.0f} % of all windows touch a digit; of those kept by "
            yield lines + ", ".join(kept) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files that evaluate.py wrote")
    parser.add_argument("--plot", type=Path, help="picture to write")
    args = parser.parse_args()
    try:
        results = Results([row for path in args.results for row in json.loads(path.read_text())])
        print("\n\n".join(report(results)))
        if args.plot:
            plot(results, args.plot)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
