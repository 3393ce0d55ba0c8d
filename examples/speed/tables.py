"""Tables and a plot of what measure_speed.py measured."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any


NATIVE, OFF = ("native", 0.0), ("stts", 0.0)
Row = dict[str, Any]


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
            lines += ["", f"{title}: milliseconds, and how many times faster than native", "", *_speed_ups(plain)]
            lines += ["", f"{title}: in detail", "", *_details(chosen, about["matmul_tflops"])]
    rates = ("first_tokens_per_second", "tokens_per_second")
    lines += _table(rows, "decoding", ("num_frames", "candidate", "prune_ratio", "is_compiled", *rates))
    numbers = ("first_ms", "forward_ms", "backward_ms", "difference", "gradient_difference")
    lines += _table(rows, "attention", ("num_frames", "num_tokens", "way", *numbers))
    return "\n".join(lines)


def speed_up(rows: Iterable[Row], num_frames: int, prune_ratio: float, number: str = "total_ms") -> float | None:
    """How many times faster than native one ratio is; `None` where either was not measured."""
    by_candidate = {
        (row["candidate"], row["prune_ratio"]): row
        for row in rows
        if row["num_frames"] == num_frames and number in row
    }
    native, stts = by_candidate.get(NATIVE), by_candidate.get(("stts", prune_ratio))
    return None if native is None or stts is None else native[number] / stts[number]


def flop_limit(rows: Iterable[Row], num_frames: int, prune_ratio: float) -> float | None:
    """What `speed_up` would be if all operations ran at one rate."""
    rows = [row | {"flops": sum(row["flops"].values())} for row in rows]
    return speed_up(rows, num_frames, prune_ratio, "flops")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(_text(cell) for cell in cells) + " |"


def _table(rows: list[Row], kind: str, columns: tuple[str, ...]) -> list[str]:
    chosen = [row for row in rows if row["kind"] == kind]
    if not chosen:
        return []
    body = [_line(row.get(column, row.get("error")) for column in columns) for row in chosen]
    return ["", kind.capitalize(), "", _line(columns), "|---" * len(columns) + "|", *body]


def _speed_ups(rows: list[Row]) -> list[str]:
    ratios = sorted({row["prune_ratio"] for row in rows if row["candidate"] == "stts"})
    head = ["frames", "native ms"]
    for ratio in ratios:
        head += [f"{100 * ratio:.0f}% ms", "times", "FLOP limit"]
    lines = [_line(head), "|---" * len(head) + "|"]
    for num_frames in sorted({row["num_frames"] for row in rows}):
        there = {(row["candidate"], row["prune_ratio"]): row for row in rows if row["num_frames"] == num_frames}
        cells = [num_frames, _milliseconds(there.get(NATIVE))]
        for ratio in ratios:
            cells.append(_milliseconds(there.get(("stts", ratio))))
            cells += [speed_up(rows, num_frames, ratio), flop_limit(rows, num_frames, ratio)]
        lines.append(_line(cells))
    return lines


def _milliseconds(row: Row | None) -> Any:
    return None if row is None else row.get("total_ms", row.get("error"))


def _details(rows: list[Row], matmul_tflops: float) -> list[str]:
    parts = [part for part in ("vit_ms", "scoring_ms", "llm_ms", "cpu_ms") if any(part in row for row in rows)]
    sizes = [size for size in ("peak_bytes", "cache_bytes") if any(row.get(size) for row in rows)]
    units = [size.replace("bytes", "GB") for size in sizes]
    head = ["frames", "candidate", "ratio", "compiled", *parts, "total_ms", *units, "TFLOP", "share of rate"]
    lines = [_line(head), "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda row: row["num_frames"]):
        tflop = sum(row["flops"].values()) / 1e12
        share = 1000 * tflop / row["total_ms"] / matmul_tflops if "total_ms" in row else None
        cells = [row["num_frames"], row["candidate"], row["prune_ratio"], row["is_compiled"]]
        cells += [row.get(part) for part in parts] + [_milliseconds(row)]
        cells += [row[size] / 1e9 if row.get(size) else None for size in sizes]
        lines.append(_line([*cells, tflop, share]))
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
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    frames = sorted({row["num_frames"] for row in rows})
    for color, ratio in enumerate(sorted({row["prune_ratio"] for row in rows if row["candidate"] == "stts"})):
        for function, style in ((speed_up, "o-"), (flop_limit, "--")):
            points = [(n, function(rows, n, ratio)) for n in frames]
            points = [point for point in points if point[1] is not None]
            label = f"{100 * ratio:.0f}% pruned" if function is speed_up else None
            speed.plot(*zip(*points), style, color=f"C{color}", label=label)
        stts = [
            row for row in rows if (row["candidate"], row["prune_ratio"]) == ("stts", ratio) and row.get("peak_bytes")
        ]
        _plot_memory(memory, stts, f"C{color}", f"{100 * ratio:.0f}% pruned")
    native = [row for row in rows if row["candidate"] == "native" and row.get("peak_bytes")]
    _plot_memory(memory, native, "black", "native")
    speed.set(xlabel="frames", ylabel="times faster than native", title="Prefill (dashed: by operations alone)")
    speed.set_xscale("log", base=2)
    memory.set(xlabel="frames", ylabel="peak memory, GB", title="Prefill")
    speed.legend()
    memory.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_memory(axes, rows: list[Row], color: str, label: str) -> None:
    points = sorted((row["num_frames"], row["peak_bytes"] / 1e9) for row in rows)
    axes.plot(*(zip(*points) if points else ([], [])), "o-", color=color, label=label)
