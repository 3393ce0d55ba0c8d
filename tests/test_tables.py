import pytest
from PIL import Image
from speed.tables import OFF, flop_limit, plot, speed_up, to_markdown


ABOUT = {
    "date": "2026-01-01",
    "command": "python measure",
    "size": "4b",
    "device": "a GPU",
    "dtype": "bfloat16",
    "versions": {"torch": "2.11", "cuda": None},
    "matmul_tflops": 800.0,
}


def prefill(candidate, prune_ratio, num_frames, total_ms=None, **more):
    row = {"kind": "prefill", "num_frames": num_frames, "batch_size": 1, "candidate": candidate}
    row |= {"prune_ratio": prune_ratio, "is_compiled": False, "flops": {"vit": 4e12, "llm": 6e12 * (1 - prune_ratio)}}
    if total_ms is None:
        return row | {"error": "out of memory"} | more
    return row | {"vit_ms": 1.0, "llm_ms": 2.0, "total_ms": total_ms, "peak_bytes": 5 * 10**9} | more


ROWS = [
    prefill("native", 0.0, 64, 100.0),
    prefill("stts", 0.0, 64, 80.0),
    prefill("stts", 0.5, 64, 40.0),
    prefill("native", 0.0, 128),
    prefill("stts", 0.5, 128, 90.0),
]
OTHERS = [
    prefill("stts", 0.5, 64, 50.0, kind="compiled prefill"),
    prefill("stts", 0.5, 64, 30.0, kind="compiled prefill", is_compiled=True),
    {"kind": "decoding", "num_frames": 64, "batch_size": 1, "candidate": "native", "prune_ratio": 0.0}
    | {"is_compiled": True, "tokens_per_second_at_first": 8.5, "tokens_per_second": 31.25},
    {"kind": "attention", "num_frames": 64, "num_tokens": 5461, "way": "sdpa", "first_ms": 1.5, "next_ms": 1.4}
    | {"forward_ms": 1.0, "backward_ms": 2.0, "difference": 0.0, "gradient_difference": 0.0},
]
RESULTS = {"about": ABOUT, "parts": {"prefill": ROWS, "others": OTHERS}}


def test_speed_ups_are_against_native_at_the_same_number_of_frames():
    assert speed_up(ROWS, 64, 0.5) == 2.5 and speed_up(ROWS, 64, 0.0) == 1.25
    assert speed_up(ROWS, 128, 0.5) is None and speed_up(ROWS, 64, 0.8) is None
    assert flop_limit(ROWS, 64, 0.5) == pytest.approx(10 / 7)
    assert flop_limit(ROWS, 128, 0.5) == pytest.approx(10 / 7)
    assert speed_up(ROWS, 64, 0.5, base=OFF) == 2.0 and flop_limit(ROWS, 64, 0.5, OFF) == pytest.approx(10 / 7)


def test_tables_of_fixed_results():
    lines = to_markdown(RESULTS).split("\n")
    assert lines[0] == (
        "a GPU, bfloat16, size 4b, torch 2.11, 2026-01-01; matrix products run at 800 TFLOP/s. `python measure`"
    )
    assert "| 64 | 100 | 80 | 1.25 | 1 | 40 | 2.5 | 1.43 |" in lines
    assert (
        "| frames | at ratio 0 ms | 50% ms | times | FLOP limit |" in lines and "| 64 | 80 | 40 | 2 | 1.43 |" in lines
    )
    assert "| 128 | out of memory | - | - | - | 90 | - | 1.43 |" in lines
    # 7e12 operations in 40 ms are 175 TFLOP/s.
    assert "| 64 | stts | 0.5 | 1 | 2 | 40 | 5 | 7 | 0.219 |" in lines
    assert "| 128 | native | 0 | - | - | out of memory | - | 10 | - |" in lines
    # Compiled runs, and those beside them, stand in a table of their own.
    start = lines.index("Prefill, compiled and not: in detail") + 4
    cells = [line.split(" | ") for line in lines[start : start + 2]]
    assert [(row[1], row[5]) for row in cells] == [("stts", "50"), ("stts, compiled", "30")]
    assert "| 64 | native, compiled | 0 | 8.5 | 31.2 |" in lines
    assert "| 64 | 5461 | sdpa | 1.5 | 1.4 | 1 | 2 | 0 | 0 |" in lines


def test_the_plot_is_a_picture(tmp_path):
    plot(RESULTS, tmp_path / "speed.png")
    assert Image.open(tmp_path / "speed.png").size == (1650, 675)
