"""Ways to choose the windows that stay, to compare the learned scorer with. None of the others learns its scores.

All work at the same place, with the same number of windows to remove and the first frame kept whole, so that a
comparison is one of the rules alone. In their own systems the similarity, frame-pair and stride rules stand after the
ViT or inside the language model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from modeling_stts import Molmo2SttsForConditionalGeneration


GOLDEN_RATIO = (5**0.5 - 1) / 2


def random_windows(windows, num_frames, stts_config) -> tuple[torch.Tensor, ...]:
    """New uniform noise for every video and call; `method="random"` repeats one pattern."""
    return torch.rand(windows.shape[:2], device=windows.device).split(num_frames)


def frame_pairs(windows, num_frames, stts_config) -> tuple[torch.Tensor, ...]:
    """
    OmniSIFT's rule for videos (arXiv 2602.04804): in the first frame of a pair the windows nearest to the frame's mean
    go, in the second those nearest to the same place of the first. Every frame loses the same number.
    """
    videos = windows.detach().flatten(2).float().split(num_frames)
    return tuple(_rank_in_frame(_pair_distances(video)) for video in videos)


def _pair_distances(video: torch.Tensor) -> torch.Tensor:
    to_mean = 1 - F.cosine_similarity(video, video.mean(1, keepdim=True), dim=-1)
    to_previous = 1 - F.cosine_similarity(video, video.roll(1, 0), dim=-1)
    is_second = torch.arange(len(video), device=video.device)[:, None] % 2 == 1
    return torch.where(is_second, to_previous, to_mean)


def _rank_in_frame(scores: torch.Tensor) -> torch.Tensor:
    """The rank of each window in its frame, as a fraction."""
    return scores.argsort(-1).argsort(-1).float() / scores.shape[-1]


def uniform_stride(windows, num_frames, stts_config) -> tuple[torch.Tensor, ...]:
    """
    ADSC's rule (arXiv 2602.12618): tokens at even distances stay. Multiples of the golden ratio, modulo 1, are spread
    so evenly that the highest scores are such a set, whatever their number.
    """
    num_windows = windows.shape[1]
    multiples = torch.arange(max(num_frames) * num_windows, dtype=torch.float64) * GOLDEN_RATIO
    scores = (multiples % 1).view(-1, num_windows).to(windows.device, torch.float32)
    return tuple(scores[:n] for n in num_frames)


def plain_bias(scores, plan, stts_config) -> torch.Tensor:
    """The logarithm of the scores as they are for a key bias: not rescaled to a row's range."""
    return torch.cat([F.pad(video[1:].log(), (0, 0, 1, 0)) for video in scores])


class Rule(NamedTuple):
    """
    stts (`dict`): fields of `SttsConfig`.
    replaced (`dict`): methods of the ViT that the rule replaces, by name.
    """

    stts: dict[str, Any]
    replaced: dict[str, Callable] = {}


# Without key bias and temporal loss, as nothing is learned.
UNLEARNED = {"method": "similarity"}
RULES = {
    "unpruned": Rule({}),
    "stts": Rule({}),
    "stts without temporal loss": Rule({"temporal_loss_weight": 0.0}),
    # With this floor every bias, and its gradient, is a millionth of what it was.
    "stts without key bias": Rule({"bias_floor": -2e-6}),
    "random": Rule(UNLEARNED, {"score_windows": random_windows}),
    "similarity": Rule(UNLEARNED),
    "frame pairs": Rule(UNLEARNED, {"score_windows": frame_pairs}),
    "uniform stride": Rule(UNLEARNED, {"score_windows": uniform_stride}),
    "stts with compact positions": Rule({"position_ids": "compact"}),
    "stts without rescaling": Rule({}, {"key_bias": plain_bias}),
}


def apply_rule(model: Molmo2SttsForConditionalGeneration, name: str) -> None:
    """
    Makes a model choose windows by a rule.

    Args:
        model: changed in place; its weights stay as they are.
        name (`str`): a key of `RULES`.

    Raises:
        ValueError: if there is no such rule.
    """
    if name not in RULES:
        raise ValueError(f"The rule must be one of {tuple(RULES)}, got {name!r}.")
    for field, value in RULES[name].stts.items():
        setattr(model.config.stts_config, field, value)
    for method, function in RULES[name].replaced.items():
        setattr(model.model.vision_tower, method, function)
