"""How much more several GPUs train: a step on one video for each, at the shapes of Molmo2-4B with random weights.

    python examples/measure_scaling.py scaling.json
    accelerate launch --config_file examples/finetuning/fsdp2.yaml --num_processes 2 examples/measure_scaling.py scaling.json
    python examples/measure_scaling.py scaling.json --mode lora
    accelerate launch --config_file examples/finetuning/ddp.yaml --num_processes 2 examples/measure_scaling.py scaling.json --mode lora

Every run adds a row to the file and prints them all; any number of processes will do. `efficiency` is the frames that a
process trains in a second, against one process alone. Weights and AdamW's state are bfloat16, and blocks are recomputed
in the backward pass, as in measure_memory.py.
"""  # noqa: E501

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from measure_memory import MODES, build, make_batch, training_loss
from speed.shapes import SIZES
from speed.tables import line

from hub_upload.tiny import tiny_config
from modeling_stts import Molmo2SttsConfig


SETTINGS = ("device", "mode", "num_frames", "prune_ratio")
COLUMNS = (*SETTINGS, "distributed", "num_processes", "step_ms", "frames_per_second", "peak_gb", "efficiency")


def measure(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """
    Returns:
        `dict`: a row with the settings, `step_ms` (median over the steps after the warm-up), `frames_per_second` of
        all processes together, and `peak_gb` of this one on a CUDA device.
    """
    device = accelerator.device.type
    config = tiny_config() if args.tiny else Molmo2SttsConfig(**SIZES["4b"])
    model = build(config, args.mode, True, device)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-6)
    model, optimizer = accelerator.prepare(model, optimizer)
    batch, times = make_batch(args.num_frames, config, device), []
    for _ in range(args.warm_up + args.steps):
        accelerator.wait_for_everyone()
        start = time.perf_counter()
        loss = training_loss(model, batch, args.prune_ratio)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        # The host must not run ahead of what is timed.
        loss.item()
        accelerator.wait_for_everyone()
        times.append(1000 * (time.perf_counter() - start))
    step_ms = statistics.median(times[args.warm_up :])
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "mode": args.mode,
        "num_frames": args.num_frames,
        "prune_ratio": args.prune_ratio,
        "distributed": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "step_ms": step_ms,
        "frames_per_second": 1000 * accelerator.num_processes * args.num_frames / step_ms,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.date.today().isoformat(),
    }


def efficiency(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """
    Args:
        row (`dict`): see `measure`.
        rows (`list[dict]`): all rows. One with the same settings and one process is what it is compared with.

    Returns:
        `float`: frames a second of a process against those of one process alone; `None` where that was not measured.
    """
    settings = [row[name] for name in SETTINGS]
    alone = [other for other in rows if other["num_processes"] == 1 and [other[name] for name in SETTINGS] == settings]
    return row["frames_per_second"] / row["num_processes"] / alone[-1]["frames_per_second"] if alone else None


def to_markdown(rows: list[dict[str, Any]]) -> str:
    rows = [row | {"efficiency": efficiency(row, rows)} for row in rows]
    head = [line(name.replace("_", " ") for name in COLUMNS), "|---" * len(COLUMNS) + "|"]
    return "\n".join(head + [line(row[name] for name in COLUMNS) for row in rows])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file")
    parser.add_argument("--mode", choices=MODES, default="full")
    parser.add_argument("--num-frames", type=int, default=64, help="of each process's video")
    parser.add_argument("--prune-ratio", type=float, default=0.5)
    parser.add_argument("--warm-up", type=int, default=3, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="the tiny model on a CPU")
    args = parser.parse_args(argv)
    accelerator = Accelerator(cpu=args.tiny)
    row = measure(args, accelerator)
    if accelerator.is_main_process:
        rows = [*(json.loads(args.results.read_text()) if args.results.exists() else []), row]
        args.results.write_text(json.dumps(rows, indent=1))
        print(to_markdown(rows))
    accelerator.end_training()


if __name__ == "__main__":
    main()
