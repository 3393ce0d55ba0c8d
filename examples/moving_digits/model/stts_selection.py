"""Which windows of a video are kept: how many follows from its length and the ratio, which ones from the scores."""

from typing import NamedTuple

import numpy as np
import torch


class PrunePlan(NamedTuple):
    """
    What is known of the pruning of a batch of videos before anything runs.

    num_frames (`list[int]`): frames of each video.
    num_rows, num_cols (`int`): the grid of windows of a frame.
    num_pruned (`list[int]`): windows to remove from each video; 0 = the video is not pruned.
    """

    num_frames: list[int]
    num_rows: int
    num_cols: int
    num_pruned: list[int]

    @property
    def num_windows(self) -> int:
        return self.num_rows * self.num_cols

    @property
    def num_kept(self) -> list[int]:
        """Windows that remain of each video."""
        return [frames * self.num_windows - pruned for frames, pruned in zip(self.num_frames, self.num_pruned)]


def count_pruned_windows(num_frames: int, num_windows: int, prune_ratio: float, prune_from_frame: int = 0) -> int:
    """
    Number of windows to remove from one video.

    The product is taken in float32 and truncated, as in the reference, which gives another number than Python's
    doubles for some ratios. All frames count, the first one too; since that one is always kept, the number is clipped
    to what the other frames hold.

    Args:
        num_frames (`int`): frames of the video.
        num_windows (`int`): windows of a frame.
        prune_ratio (`float`): fraction of the video's windows to remove, `0 <= prune_ratio < 1`.
        prune_from_frame (`int`): frames that do not count.

    Returns:
        `int`: at least 0, at most `num_windows * (num_frames - 1)`.
    """
    count = int(np.float32(num_windows * prune_ratio) * np.float32(num_frames - prune_from_frame))
    return max(0, min(count, num_windows * (num_frames - 1)))


def plan_pruning(
    video_grids: list[list[int]], prune_ratio: float | list[float], prune_from_frame: int = 0
) -> PrunePlan:
    """
    Plans the pruning of a batch of videos.

    Args:
        video_grids (`list[list[int]]`): frames, rows and columns of windows of each video.
        prune_ratio (`float` or `list[float]`):
            Fraction of each video's windows to remove, `0 <= prune_ratio < 1`; one for all videos or one for each.
        prune_from_frame (`int`): frames of a video that do not count.

    Returns:
        `PrunePlan`

    Raises:
        ValueError: if the videos have different grids, or there are not as many ratios as videos.
    """
    grids = {(rows, cols) for _, rows, cols in video_grids}
    if len(grids) != 1:
        raise ValueError(f"All videos of a batch must have one grid of windows, got {sorted(grids)} (rows, columns).")
    ((rows, cols),) = grids
    num_frames = [frames for frames, _, _ in video_grids]
    ratios = prune_ratio if isinstance(prune_ratio, list) else [prune_ratio] * len(num_frames)
    if len(ratios) != len(num_frames):
        raise ValueError(f"Got {len(ratios)} values of `prune_ratio` for {len(num_frames)} videos.")
    num_pruned = [
        count_pruned_windows(frames, rows * cols, ratio, prune_from_frame) for frames, ratio in zip(num_frames, ratios)
    ]
    return PrunePlan(num_frames, rows, cols, num_pruned)


def select_windows(scores: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """
    Drops the lowest scores of one video, over all its frames together. The first frame is always kept; of equal
    scores the one that comes first is dropped.

    Args:
        scores (`torch.Tensor` of shape `(num_frames, num_windows)`): higher = keep.
        num_pruned (`int`): windows to drop, at most `num_windows * (num_frames - 1)`.

    Returns:
        `torch.Tensor` of shape `(num_frames, num_windows)`, bool: the keep_mask.
    """
    num_windows = scores.shape[1]
    order = scores[1:].detach().flatten().argsort(stable=True) + num_windows
    keep_mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    return keep_mask.index_fill(0, order[:num_pruned], False).view_as(scores)


def kept_window_idx(keep_mask: torch.Tensor, num_kept: int) -> torch.Tensor:
    """
    Indices of the kept windows in order. Their number is known beforehand, so no device has to be waited for.

    Args:
        keep_mask (`torch.Tensor`, bool): any shape.
        num_kept (`int`): how many are True.

    Returns:
        `torch.Tensor` of shape `(num_kept,)`, int64: indices into the flattened mask.
    """
    return keep_mask.flatten().byte().argsort(descending=True, stable=True)[:num_kept]


def random_scores(num_frames: int, num_windows: int, seed: int) -> torch.Tensor:
    """
    Uniform noise as scores, the same on every device and whatever stands beside the video in its batch.

    Args:
        num_frames (`int`), num_windows (`int`): shape of the video.
        seed (`int`): seed of the video's own generator.

    Returns:
        `torch.Tensor` of shape `(num_frames, num_windows)`, float32 on the CPU, in [0, 1).
    """
    return torch.rand(num_frames, num_windows, generator=torch.Generator().manual_seed(seed))
