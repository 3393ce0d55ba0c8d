"""Speed and memory of native Molmo2 and of STTS, at the shapes of Molmo2-4B with random weights in bfloat16.

    python examples/measure_speed.py speed.json                            # one CUDA device: everything
    python examples/measure_speed.py speed.json --parts prefill --num-frames 64 128 --batch-sizes 1
    python examples/measure_speed.py speed.json --size cpu --num-frames 8 16 --parts prefill --threads 2
    python examples/measure_speed.py speed.json --report --plot speed.png  # tables and plot of results that are there

Results are written after every part, those that count most first, and a run goes on where the file ends: what it holds
is not measured again. `--minutes` says after how long no further part begins.
"""

import argparse
import datetime
import json
import platform
import sys
import time
from pathlib import Path

import torch
import transformers
from speed.cells import (
    Candidate,
    Runs,
    measure_attention,
    measure_compiled_prefill,
    measure_decoding,
    measure_prefill,
    measure_training,
)
from speed.shapes import SIZES, build_models
from speed.tables import plot, to_markdown
from speed.timing import matmul_tflops


PARTS = ("attention", "prefill", "training", "decoding", "long", "compile")
RATIOS = (0.0, 0.5, 0.8)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file")
    parser.add_argument("--size", choices=SIZES, default="4b")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--num-frames", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--long", type=int, default=1024, help="frames of the long video, 50%% pruned")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--runs", type=int, default=7, help="at most")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--no-cudnn", action="store_true", help="leave attention to the other kernels of torch")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--plot", type=Path, help="PNG file")
    return parser.parse_args(argv)


def describe(device, dtype, size):
    """What the results depend on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()}"
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "size": size,
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda},
        "matmul_tflops": matmul_tflops(device, dtype),
    }


def plan(args, device, native, stts):
    """
    What is to be measured, most important first.

    Returns:
        `list[tuple[str, Callable]]`: a name, and what returns the rows of it.
    """
    ratios = [Candidate("stts", stts, ratio) for ratio in RATIOS]
    candidates, runs = [Candidate("native", native), *ratios], Runs(most=args.runs)
    frames = sorted(args.num_frames)
    # What takes long comes last: the longest videos, and compiling.
    short, longest = [n for n in frames if n <= 256], [n for n in frames if n > 256]
    jobs = []

    def add(part, name, function, *arguments):
        if part in args.parts:
            jobs.append((f"{part} {name}", lambda: function(*arguments)))

    kernels = ["cudnn", "flash"] if device.type == "cuda" else ["cpu"]
    for n in [8, 16, *short]:
        add("attention", f"{n} frames", measure_attention, stts.config.text_config, n, kernels, device)
    first, *larger = args.batch_sizes
    for n in short:
        add("prefill", f"{n} frames, batch {first}", measure_prefill, candidates, n, first, device, runs)
    rounds = Runs(warm_up=0, most=min(3, args.runs), least=1, seconds=8.0)
    for n in short:
        add("decoding", f"{n} frames", measure_decoding, candidates, n, 24, device, rounds)
    few = Runs(warm_up=1, most=min(3, args.runs), least=2, seconds=8.0)
    for n in [n for n in short if n >= 64] or short:
        add("training", f"{n} frames", measure_training, candidates[:3], n, 1, device, few)
    add("long", f"{args.long} frames", measure_prefill, [ratios[1]], args.long, 1, device, few)
    for n in longest:
        add("prefill", f"{n} frames, batch {first}", measure_prefill, candidates, n, first, device, few)
    for batch_size in larger:
        for n in [n for n in short if n * batch_size <= 512]:
            add("prefill", f"{n} frames, batch {batch_size}", measure_prefill, candidates, n, batch_size, device, few)
    pruned, compiled = (Candidate("stts", stts, 0.5, is_compiled) for is_compiled in (False, True))
    add("compile", "prefill", measure_compiled_prefill, [pruned, compiled], frames[0], 1, device, runs)
    longest_short = max(n for n in frames if n <= max(128, frames[0]))
    decoders = [compiled._replace(prune_ratio=0.0), compiled]
    add("compile", "decoding", measure_decoding, decoders, longest_short, 48, device, rounds._replace(most=1))
    return jobs


def measure(args):
    """Measures what is not in the file yet, and writes it there."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.enable_cudnn_sdp(not args.no_cudnn)
    device = torch.device("cuda" if torch.cuda.is_available() and args.size != "cpu" else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    start = time.monotonic()
    results = json.loads(args.results.read_text()) if args.results.exists() else {"about": None, "parts": {}}
    results["about"] = describe(device, dtype, args.size)
    native, stts = build_models(args.size, device, dtype)
    for name, job in plan(args, device, native, stts):
        if name in results["parts"]:
            continue
        if time.monotonic() - start > 60 * args.minutes:
            print(f"No time for {name}.", flush=True)
            continue
        results["parts"][name] = job()
        args.results.write_text(json.dumps(results, indent=1))
        print(f"{time.monotonic() - start:6.0f} s  {name}", flush=True)


def main(argv=None) -> None:
    args = parse_args(argv)
    if not args.report:
        measure(args)
    results = json.loads(args.results.read_text())
    print(to_markdown(results))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
