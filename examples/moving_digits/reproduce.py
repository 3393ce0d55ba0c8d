"""Makes the benchmark, trains every model behind the README's table on one GPU or several, and evaluates them.

    python examples/moving_digits/reproduce.py OUT                 # all of it
    python examples/moving_digits/reproduce.py OUT --minutes 9     # a slice; the same command goes on where it ended

Data are drawn from scikit-learn's digits and the photographs of scikit-learn and scikit-image: for pictures and the
base from seed 0, for the rules from seeds 1 to 3. All rules start from one base and see the same batches of a seed.
Several jobs share a GPU. Each leaves a log in OUT/logs, and is not done again once it is finished. In the end
`report.py OUT/results/*.json` has the table, and OUT/stts-1/final is the model that ships.

On four H200 (2026-11-26) the jobs take 222 seconds (pictures), 419 (base) and 228 (a rule, six on each GPU), so the
model that ships takes 15 minutes of one.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rules import RULES
from tqdm import tqdm


HERE = Path(__file__).parent
SEEDS = (1, 2, 3)  # of the rules; pictures and base have 0
ABLATIONS = ("stts with compact positions", "stts without rescaling")  # with the first seed alone
VIDEOS = ("--num-videos", "250", "150", "250")
PICTURES = ("--stage", "pictures", "--steps", "2400", "--frames-per-batch", "256", "--workers", "12")
BASE = ("--rule", "unpruned", "--steps", "4800", "--easy-steps", "1000", "--vision-learning-rate", "3e-4")
RULE = ("--steps", "1600", "--frames-per-batch", "192", "--learning-rate", "3e-4", "--vision-learning-rate", "1e-4")
SIDE_BY_SIDE = 6  # jobs on a GPU: one alone leaves most of a large one idle
TAIL = 2000  # characters of a failed job's log that are shown


class Job(NamedTuple):
    """
    One process.

    name (`str`): of its log.
    script (`str`), args (`tuple[str, ...]`): what runs.
    result (`Path`): exists when the job is finished.
    needs (`tuple[Path, ...]`): results of others that must exist before.
    """

    name: str
    script: str
    args: tuple[str, ...]
    result: Path
    needs: tuple[Path, ...] = ()

    @property
    def is_training(self) -> bool:
        return self.script == "train.py"

    def is_ready(self) -> bool:
        return all(path.exists() for path in self.needs)


def plan_jobs(out: Path) -> list[Job]:
    """All jobs, the most important first."""
    videos, pictures, base = out / "videos", out / "pictures" / "final", out / "base" / "final"
    jobs = [
        Job("videos", "benchmark.py", (str(videos), *VIDEOS), videos),
        Job("pictures", "train.py", (str(pictures.parent), *PICTURES), pictures),
        Job("base", "train.py", (str(base.parent), "--init", str(pictures), *BASE), base, (pictures,)),
    ]
    wanted = [(rule, seed) for seed in SEEDS for rule in RULES if rule not in ABLATIONS]
    for rule, seed in [*wanted, *((rule, SEEDS[0]) for rule in ABLATIONS)]:
        name = f"{rule.replace(' ', '-')}-{seed}"
        trained, results = out / name / "final", out / "results" / f"{name}.json"
        options = ("--init", str(base), "--rule", rule, "--seed", str(seed), *RULE)
        evaluated = (str(results), str(videos), f"{rule}:{seed}:{trained}")
        jobs += [
            Job(name, "train.py", (str(trained.parent), *options), trained, (base,)),
            Job(f"evaluate-{name}", "evaluate.py", evaluated, results, (videos, trained)),
        ]
    return jobs


def visible_gpus() -> list[str]:
    """Names of the GPUs that jobs may use, as `CUDA_VISIBLE_DEVICES` takes them; one that is empty on a CPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(gpu) for gpu in range(torch.cuda.device_count())] or [""]


def run_jobs(jobs: list[Job], logs: Path, end: float | None, gpus: list[str]) -> bool:
    """
    Runs what is ready, several jobs side by side, until all is finished or time is up.

    Args:
        jobs (`list[Job]`): the most important first.
        logs (`Path`): folder of the logs.
        gpus (`list[str]`): see `visible_gpus`. A job gets the one that has the fewest.
        end (`float`, *optional*): time, as `time.monotonic()` counts it, after which nothing is started; trainings
            save a checkpoint then.

    Returns:
        `bool`: whether all is finished.

    Raises:
        RuntimeError: if a job fails; the others are stopped.
    """
    running: dict[subprocess.Popen, tuple[Job, str]] = {}
    waiting = [job for job in jobs if not job.result.exists()]
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), disable=not sys.stderr.isatty()) as bar:
        try:
            while running or (waiting and not _is_over(end)):
                for job in [job for job in waiting if job.is_ready()][: SIDE_BY_SIDE * len(gpus) - len(running)]:
                    if not _is_over(end):
                        waiting.remove(job)
                        used = [gpu for _, gpu in running.values()]
                        gpu = min(gpus, key=used.count)
                        running[_start(job, logs, end, gpu)] = job, gpu
                time.sleep(0.2)
                for process in [process for process in running if process.poll() is not None]:
                    job, _ = running.pop(process)
                    if process.returncode:
                        raise RuntimeError(f"{job.name} failed:\n{_log(job, logs).read_text()[-TAIL:]}")
                    bar.update(job.result.exists())
        finally:
            for process in running:
                process.kill()
    return all(job.result.exists() for job in jobs)


def _is_over(end: float | None) -> bool:
    return end is not None and time.monotonic() >= end


def _log(job: Job, logs: Path) -> Path:
    return logs / f"{job.name}.log"


def _start(job: Job, logs: Path, end: float | None, gpu: str) -> subprocess.Popen:
    command = [sys.executable, str(HERE / job.script), *job.args]
    if job.is_training and end is not None:
        command += ["--minutes", str(max(end - time.monotonic(), 0) / 60)]
    with _log(job, logs).open("a") as log:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for videos, models, results and logs")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; the same command goes on later")
    args = parser.parse_args()
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    for folder in ("logs", "results"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    try:
        is_finished = run_jobs(plan_jobs(args.out), args.out / "logs", end, visible_gpus())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    print(f"{'finished' if is_finished else 'stopped; the same command goes on'}: {args.out}")


if __name__ == "__main__":
    main()
