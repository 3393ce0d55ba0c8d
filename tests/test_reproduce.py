import time
from pathlib import Path

import pytest
import reproduce
from reproduce import Job, plan_jobs, run_jobs, visible_gpus
from rules import RULES


def job(folder, name, code="", needs=(), trains=False):
    """A job that writes its arguments into its result, after `code`."""
    script = folder / ("train.py" if trains else f"{name}.py")
    script.write_text(
        f"import pathlib, sys, time\n{code}\npathlib.Path(sys.argv[1]).write_text(' '.join(sys.argv[2:]))\n"
    )
    result = folder / f"{name}.txt"
    # An absolute script stands for one beside reproduce.py.
    return Job(name, "train.py" if trains else str(script), (str(result),), result, tuple(needs))


def test_every_rule_is_trained_from_one_base_and_evaluated(tmp_path):
    jobs = plan_jobs(tmp_path)
    assert len({job.result for job in jobs}) == len({job.name for job in jobs}) == len(jobs)
    results = {job.result: job for job in jobs}
    assert all(path in results for job in jobs for path in job.needs)
    evaluated = [job.args[2].split(":") for job in jobs if job.script == "evaluate.py"]
    assert {rule for rule, *_ in evaluated} == set(RULES)
    assert [seed for rule, seed, _ in evaluated if rule == "random"] == ["1", "2", "3"]
    assert all(Path(folder) in results for *_, folder in evaluated)
    base = tmp_path / "base" / "final"
    assert all(base in job.needs for job in jobs if "--rule" in job.args and job.name != "base")


def test_jobs_run_after_what_they_need_and_once(tmp_path):
    first = job(tmp_path, "first")
    second = job(tmp_path, "second", f"assert pathlib.Path({str(first.result)!r}).exists()", [first.result])
    assert run_jobs([second, first], tmp_path, end=None, gpus=[""])
    written = second.result.stat().st_mtime_ns
    assert run_jobs([second, first], tmp_path, end=None, gpus=[""])
    assert second.result.stat().st_mtime_ns == written


def test_no_more_jobs_than_allowed_run_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "SIDE_BY_SIDE", 2)
    count = f"lock = pathlib.Path({str(tmp_path)!r}, sys.argv[1] + '.lock'); lock.touch(); time.sleep(0.3)"
    count += f"\nrunning = len(list(pathlib.Path({str(tmp_path)!r}).glob('*.lock'))); lock.unlink()"
    jobs = [job(tmp_path, f"job{i}", count + "\nassert running <= 2, running") for i in range(5)]
    assert run_jobs(jobs, tmp_path, end=None, gpus=[""])


def test_jobs_are_spread_over_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "SIDE_BY_SIDE", 2)
    code = "import os; sys.argv.append(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.5)"
    jobs = [job(tmp_path, f"job{i}", code) for i in range(4)]
    assert run_jobs(jobs, tmp_path, end=None, gpus=["3", "7"])
    assert [each.result.read_text() for each in jobs] == ["3", "7", "3", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    assert visible_gpus() == ["3", "7"]


def test_a_failed_job_is_shown_and_stops_the_others(tmp_path):
    slow, bad = job(tmp_path, "slow", "time.sleep(60)"), job(tmp_path, "bad", "sys.exit('no such device')")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="bad failed:\nno such device"):
        run_jobs([slow, bad], tmp_path, end=None, gpus=[""])
    assert time.monotonic() - start < 30 and not slow.result.exists()


def test_nothing_begins_when_time_is_up(tmp_path):
    assert not run_jobs([job(tmp_path, "late")], tmp_path, end=time.monotonic(), gpus=[""])
    assert not (tmp_path / "late.log").exists()


def test_trainings_are_told_how_much_time_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    training = job(tmp_path, "training", trains=True)
    assert run_jobs([training], tmp_path, end=time.monotonic() + 60, gpus=[""])
    option, minutes = training.result.read_text().split()
    assert option == "--minutes" and 0.8 < float(minutes) <= 1
