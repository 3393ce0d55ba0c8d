"""Tables and a plot of what measure_speed.py measured."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any


Row = dict[str, Any]
Key = tuple[str, float]  # candidate and ratio
HEADS = {"num_frames": "frames", "num_tokens": "tokens", "prune_ratio": "ratio"}
NATIVE, OFF = ("native", 0.0), ("stts", 0.0)


def to_markdown(results: dict[str, Any]) -> str:
    """
    Args:
        results (`dict`): `about`, and `parts`, which has a list of rows for each part that was measured.

    Returns:
        `str`: a table for each kind of row that is there.
    """
    about = results["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    lines = [
        f"{about['device']}, {about['dtype']}, size {about['size']}, {versions}, {about['date']}; matrix products run "
        f"at {about['matmul_tflops']:.3g} TFLOP/s. `{about['command']}`"
    ]
    rows = [row for part in results["parts"].values() for row in part]
    for kind in ("prefill", "training"):
        for batch_size in sorted({row["batch_size"] for row in rows if row["kind"] == kind}):
            chosen = [row for row in rows if row["kind"] == kind and row["batch_size"] == batch_size]
            plain = [row for row in chosen if not row["is_compiled"]]
            title = f"{kind.capitalize()}, batch of {batch_size}"
            for base, name in ((NATIVE, "native"), (OFF, "at ratio 0")):
                lines += ["", f"{title}: milliseconds, and how many times faster than {name}", ""]
                lines += _speed_ups(plain, base, name)
            lines += ["", f"{title}: in detail", "", *_details(chosen, about["matmul_tflops"])]
    compiled = [row for row in rows if row["kind"] == "compiled prefill"]
    if compiled:
        lines += ["", "Prefill, compiled and not: in detail", "", *_details(compiled, about["matmul_tflops"])]
    rates = ("tokens_per_second_at_first", "tokens_per_second")
    lines += _table(rows, "decoding", ("num_frames", "candidate", "prune_ratio", *rates))
    numbers = ("first_ms", "next_ms", "forward_ms", "backward_ms", "difference", "gradient_difference")
    lines += _table(rows, "attention", ("num_frames", "num_tokens", "way", *numbers))
    return "\n".join(lines)


def _key(row: Row) -> Key:
    return row["candidate"], row["prune_ratio"]


def speed_up(
    rows: Iterable[Row],
    num_frames: int,
    prune_ratio: float,
    number: str = "total_ms",
    base: Key = NATIVE,
) -> float | None:
    """How many times faster than the base one ratio is; `None` where either was not measured."""
    by_candidate = {_key(row): row for row in rows if row["num_frames"] == num_frames and number in row}
    slow, fast = by_candidate.get(base), by_candidate.get(("stts", prune_ratio))
    return None if slow is None or fast is None else slow[number] / fast[number]


def flop_limit(rows: Iterable[Row], num_frames: int, prune_ratio: float, base: Key = NATIVE) -> float | None:
    """What `speed_up` would be if all operations ran at one rate."""
    rows = [row | {"flops": sum(row["flops"].values())} for row in rows]
    return speed_up(rows, num_frames, prune_ratio, "flops", base)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def line(cells: Iterable[Any]) -> str:
    """A line of a table: numbers with three digits or more, `-` for `None`."""
    return "| " + " | ".join(_text(cell) for cell in cells) + " |"


def _table(rows: list[Row], kind: str, columns: tuple[str, ...]) -> list[str]:
    chosen = [row | {"candidate": _name(row)} for row in rows if row["kind"] == kind]
    columns = [column for column in columns if any(column in row for row in chosen)]
    if not chosen:
        return []
    head = [HEADS.get(column, column.replace("_", " ")) for column in columns]
    body = [line(row.get(column, row.get("error")) for column in columns) for row in chosen]
    return ["", kind.capitalize(), "", line(head), "|---" * len(head) + "|", *body]


def _name(row: Row) -> str | None:
    return f"{row['candidate']}, compiled" if row.get("is_compiled") else row.get("candidate")


def _speed_ups(rows: list[Row], base: Key, name: str) -> list[str]:
    stts = {_key(row) for row in rows} - {NATIVE, base}
    ratios = sorted(ratio for _, ratio in stts)
    head = ["frames", f"{name} ms"]
    for ratio in ratios:
        head += [f"{100 * ratio:.0f}% ms", "times", "FLOP limit"]
    lines = [line(head), "|---" * len(head) + "|"]
    for num_frames in sorted({row["num_frames"] for row in rows}):
        there = {_key(row): row for row in rows if row["num_frames"] == num_frames}
        cells = [num_frames, _milliseconds(there.get(base))]
        for ratio in ratios:
            cells.append(_milliseconds(there.get(("stts", ratio))))
            cells += [speed_up(rows, num_frames, ratio, base=base), flop_limit(rows, num_frames, ratio, base)]
        lines.append(line(cells))
    return lines


def _milliseconds(row: Row | None) -> Any:
    return None if row is None else row.get("total_ms", row.get("error"))


def _details(rows: list[Row], matmul_tflops: float) -> list[str]:
    parts = [part for part in ("vit_ms", "scoring_ms", "llm_ms", "launch_ms") if any(part in row for row in rows)]
    sizes = [size for size in ("peak_bytes", "cache_bytes") if any(row.get(size) for row in rows)]
    units = [size.replace("_bytes", " GB") for size in sizes]
    times = [part.replace("_", " ") for part in (*parts, "total_ms")]
    head = ["frames", "candidate", "ratio", *times, *units, "TFLOP", "share of rate"]
    lines = [line(head), "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda row: row["num_frames"]):
        tflop = sum(row["flops"].values()) / 1e12
        share = 1000 * tflop / row["total_ms"] / matmul_tflops if "total_ms" in row else None
        cells = [row["num_frames"], _name(row), row["prune_ratio"]]
        cells += [row.get(part) for part in parts] + [_milliseconds(row)]
        cells += [row[size] / 1e9 if row.get(size) else None for size in sizes]
        lines.append(line([*cells, tflop, share]))
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """
    Draws how many times faster than native each ratio is against the number of frames, with the limits by operations
    as dashed lines, and the peak of memory.

    Args:
        results (`dict`): see `to_markdown`.
        path (`Path`): PNG file to write.
    """
    import matplotlib.pyplot as plt

    rows = [row for part in results["parts"].values() for row in part]
    rows = [row for row in rows if row["kind"] == "prefill" and row["batch_size"] == 1 and not row["is_compiled"]]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    frames = sorted({row["num_frames"] for row in rows})
    _plot_speed(speed, rows, frames)
    _plot_memory(memory, rows)
    for axes in (speed, memory):
        axes.set_xlabel("frames of a video")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Prefill, {results['about']['device']}, {results['about']['date']}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_speed(axes, rows: list[Row], frames: list[int]) -> None:
    for color, ratio in enumerate(sorted({row["prune_ratio"] for row in rows if row["candidate"] == "stts"})):
        for function, style in ((speed_up, "o-"), (flop_limit, "--")):
            points = [(n, function(rows, n, ratio)) for n in frames]
            points = [point for point in points if point[1] is not None]
            label = f"{100 * ratio:.0f}% pruned" if function is speed_up else None
            axes.plot(*zip(*points), style, color=f"C{color}", label=label)
    axes.plot([], [], "--", color="gray", label="by operations alone")
    axes.set(ylabel="times faster than native", xscale="log")
    axes.set_xticks(frames, frames)
    axes.minorticks_off()


def _plot_memory(axes, rows: list[Row]) -> None:
    measured = [row for row in rows if row.get("peak_bytes")]
    # Every second line is dashed, because lines may lie on each other.
    for number, (name, ratio) in enumerate(sorted({_key(row) for row in measured})):
        points = sorted((row["num_frames"], row["peak_bytes"] / 1e9) for row in measured if _key(row) == (name, ratio))
        color, label = ("black", name) if name == "native" else (f"C{number - 1}", f"{100 * ratio:.0f}% pruned")
        style, size = (("o-", 8), ("o--", 5))[number % 2]
        axes.plot(*zip(*points), style, color=color, label=label, linewidth=2, markersize=size)
    axes.set(ylabel="peak memory with the weights, GB", xlim=(0, None))
