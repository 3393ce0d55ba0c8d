"""Clocks for a CUDA device or a CPU, and stopwatches on functions of a model."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Clock:
    """Points in time: on a CUDA device in its own queue, without waiting for it."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two points. On a CUDA device `wait` comes first."""
        return start.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - start)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Stopwatch:
    """
    Measures functions while they run inside a model.

    Args:
        device (`torch.device`): where they compute.
    """

    def __init__(self, device: torch.device):
        self.clock = Clock(device)
        self.laps = []

    def wrap(self, function: Callable, name: str) -> Callable:
        """The function with a stopwatch: its time counts under `name`."""

        def timed(*args, **kwargs):
            start = self.clock.now()
            result = function(*args, **kwargs)
            self.laps.append((name, start, self.clock.now()))
            return result

        return timed

    @contextlib.contextmanager
    def on(self, *functions: tuple[Any, str, str]) -> Iterator[None]:
        """
        Puts stopwatches on attributes for a while.

        Args:
            functions (`tuple[object, str, str]`): owner, attribute, and the name under which its time counts.
        """
        with contextlib.ExitStack() as stack:
            for owner, attribute, name in functions:
                given = vars(owner).get(attribute)
                setattr(owner, attribute, self.wrap(getattr(owner, attribute), name))
                undo = (delattr, owner, attribute) if given is None else (setattr, owner, attribute, given)
                stack.callback(*undo)
            yield

    def read(self) -> dict[str, float]:
        """Milliseconds by name since the last reading. Waits for the device."""
        self.clock.wait()
        times = {}
        for name, start, end in self.laps:
            times[name] = times.get(name, 0.0) + self.clock.milliseconds(start, end)
        self.laps = []
        return times


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians by name, of runs that have the same names."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """
    Measured rate of a large matrix product of random numbers, in 10 ** 12 operations a second: the ceiling that other
    rates are compared with.
    """
    size, clock, times = 8192 if device.type == "cuda" else 1024, Clock(device), []
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    for _ in range(13):
        start = clock.now()
        left @ right
        end = clock.now()
        clock.wait()
        times.append(clock.milliseconds(start, end))
    return 2 * size**3 / statistics.median(times[3:]) / 1e9
