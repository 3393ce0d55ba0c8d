"""How the prune ratio and the learning rates change during a training. Functions of the step: nothing to save."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from modeling_stts.configuration_stts import check_prune_ratio


class PruneSchedule(NamedTuple):
    """
    The prune ratio of each step, the same for all its batches and all processes.

    target (`float`): fraction of windows to remove, `0 <= target < 1`.
    choices (`tuple[float]`): if there are any, every step draws one of these ratios in the target's place, so that
        one model serves them all.
    warmup_steps (`int`): steps in which the ratio grows from 0, by the same share of it each step.
    seed (`int`): what they are drawn from, with the number of the step.
    """

    target: float
    choices: tuple[float, ...] = ()
    warmup_steps: int = 0
    seed: int = 0

    def check(self) -> None:
        """Raises a `ValueError` if a ratio or the number of steps is out of its range."""
        for ratio in (self.target, *self.choices):
            check_prune_ratio(ratio)
        if self.warmup_steps < 0:
            raise ValueError(f"`prune_warmup_steps` must be at least 0, got {self.warmup_steps}.")

    def ratio(self, step: int) -> float:
        """
        Args:
            step (`int`): number of the optimizer's step, from 0.

        Returns:
            `float`: fraction of windows to remove.
        """
        ratio = self.target
        if self.choices:
            ratio = float(np.random.default_rng([self.seed, step]).choice(self.choices))
        return ratio * min(1.0, step / self.warmup_steps) if self.warmup_steps else ratio


def make_lr_scheduler(
    optimizer: torch.optim.Optimizer, name: str, num_steps: int, warmup_steps: dict[str, int], **kwargs
) -> LambdaLR:
    """
    A schedule of transformers, with a warm-up of its own for every group.

    Args:
        optimizer (`torch.optim.Optimizer`): its parameter groups have a `"group"`.
        name (`str`): such as `"cosine"`; one that multiplies the rate by a function of the step.
        num_steps (`int`): of the training.
        warmup_steps (`dict[str, int]`): of each group.
        kwargs: as for `get_scheduler`.

    Raises:
        ValueError: if the schedule is not such a function.
    """
    functions: dict[str, Callable[[int], float]] = {}
    for group, steps in warmup_steps.items():
        unused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = get_scheduler(name, unused, steps, num_steps, scheduler_specific_kwargs=kwargs)
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(f"`lr_scheduler_type` must be a function of the step, such as linear, got {name!r}.")
        functions[group] = scheduler.lr_lambdas[0]
    return LambdaLR(optimizer, [functions[group["group"]] for group in optimizer.param_groups])
