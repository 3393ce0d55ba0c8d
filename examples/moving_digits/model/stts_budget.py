"""How many frames of a video are sampled, and with which ratio they are pruned, so that a number of tokens remains."""

from typing import NamedTuple

import numpy as np

from .configuration_stts import check_prune_ratio
from .stts_selection import count_pruned_windows


# The highest of the paper: where a limit on the tokens needs a higher ratio, fewer frames are sampled.
HIGHEST_RATIO = 0.8


class TokenBudget(NamedTuple):
    """
    What may remain of each video. Made by `make_budget`. Frames that do not count (`prune_from_frame`) are not known
    here: there must be none.

    num_windows (`int`): windows of a frame.
    prune_ratio (`float`): fraction of a video's windows that is removed at least, `0 <= prune_ratio < 1`.
    frame_scale (`float`): so many times as many frames, of which as many windows remain.
    max_video_tokens (`int`, *optional*): so many windows remain at most.
    """

    num_windows: int
    prune_ratio: float
    frame_scale: float
    max_video_tokens: int | None

    def scale_frames(self, num_frames: int) -> int:
        """
        Args:
            num_frames (`int`): how many frames would be sampled otherwise.

        Returns:
            `int`: how many are to be sampled.
        """
        scaled = round(num_frames * self.frame_scale)
        return scaled if self.max_video_tokens is None else min(scaled, self._most_frames())

    def raise_ratio(self, num_frames: int, num_sampled: int) -> float:
        """
        Args:
            num_frames (`int`): how many frames would be sampled otherwise.
            num_sampled (`int`): how many were sampled.

        Returns:
            `float`: the fraction of the video's windows to remove: `prune_ratio` if that is enough, else one at which
            exactly as many windows remain as may.
        """
        may_remain = self._num_kept(num_frames)
        if self.max_video_tokens is not None:
            may_remain = min(may_remain, self.max_video_tokens)
        if self._num_kept(num_sampled) <= may_remain:
            return self.prune_ratio
        # Half a window more, so that the count is the same after it is rounded.
        num_windows = num_sampled * self.num_windows
        return (num_windows - may_remain + 0.5) / num_windows

    def _num_kept(self, num_frames: int, prune_ratio: float | None = None) -> int:
        ratio = self.prune_ratio if prune_ratio is None else prune_ratio
        return num_frames * self.num_windows - count_pruned_windows(num_frames, self.num_windows, ratio)

    def _most_frames(self) -> int:
        """The largest number of frames of which few enough windows remain at the highest ratio."""
        ratio = max(self.prune_ratio, HIGHEST_RATIO)
        # One more than the exact quotient, because counts are rounded.
        num_frames = int(self.max_video_tokens / (self.num_windows * (1 - ratio))) + 1
        while self._num_kept(num_frames, ratio) > self.max_video_tokens:
            num_frames -= 1
        return num_frames


def make_budget(
    num_windows: int, frame_scale: float | None, max_video_tokens: int | None, prune_ratio: float | None
) -> TokenBudget | None:
    """
    Checks what is asked for.

    Args:
        num_windows (`int`): windows of a frame.
        frame_scale (`float`, *optional*): so many times as many frames, of which as many windows remain; at least 1.
        max_video_tokens (`int`, *optional*): so many windows remain of each video at most; at least those of a frame.
        prune_ratio (`float`, *optional*): fraction that is removed at least. Needed with `frame_scale`, else 0.

    Returns:
        `TokenBudget`, or `None` if neither `frame_scale` nor `max_video_tokens` is given.

    Raises:
        ValueError: naming the value that is out of its range.
    """
    if frame_scale is None and max_video_tokens is None:
        return None
    if frame_scale is not None and not 1 <= frame_scale < np.inf:
        raise ValueError(f"`frame_scale` must be a number that is at least 1, got {frame_scale}.")
    if frame_scale is not None and prune_ratio is None:
        raise ValueError(
            f"`frame_scale`={frame_scale} needs `prune_ratio`, the fraction that is removed without it: give the "
            "model's, `model.config.stts_config.prune_ratio`."
        )
    if max_video_tokens is not None and max_video_tokens < num_windows:
        raise ValueError(
            f"`max_video_tokens` must be at least {num_windows}, the tokens of a video's first frame, which is always "
            f"kept whole; got {max_video_tokens}."
        )
    ratio = check_prune_ratio(0 if prune_ratio is None else prune_ratio)
    return TokenBudget(num_windows, ratio, frame_scale or 1, max_video_tokens)


__all__ = ["TokenBudget", "make_budget"]
