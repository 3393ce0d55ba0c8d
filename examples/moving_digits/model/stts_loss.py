"""How alike neighbouring frames are, and the loss that teaches the scorer to see it."""

import torch
from torch.nn import functional as F


def neighbor_similarity(
    windows: torch.Tensor, num_frames: list[int], chunk_frames: int | None = None
) -> list[torch.Tensor]:
    """
    Cosine between each window and the same window one frame before, over the window's concatenated patches.

    Args:
        windows (`torch.Tensor` of shape `(total_frames, num_windows, num_patches, hidden_size)`):
            Patches of all videos, one after the other.
        num_frames (`list[int]`): frames of each video.
        chunk_frames (`int`, *optional*): how many frames are compared with the one before at once; all by default.

    Returns:
        `list[torch.Tensor]` of shape `(num_frames - 1, num_windows)`, float32, in [-1, 1]: for each video; row `f`
        compares frames `f` and `f + 1`. Gradients flow into both frames.
    """
    size = len(windows) if chunk_frames is None else chunk_frames
    chunks = [windows[start : start + size + 1] for start in range(0, len(windows), size)]
    # The last frame of a video is compared with the first one of the next, or with nothing, and that is taken away.
    similarity = F.pad(torch.cat([_similarity(chunk) for chunk in chunks]), (0, 0, 0, 1))
    return [video[:-1] for video in similarity.split(num_frames)]


def _similarity(frames: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(frames.flatten(2).float(), dim=-1)
    return (unit[1:] * unit[:-1]).sum(-1)


def temporal_loss(scores: list[torch.Tensor], similarities: list[torch.Tensor]) -> torch.Tensor:
    """
    Mean squared error between the scores and 1 - similarity to the frame before (paper section 3, loss of the
    scorer), over frames 1.. of every pruned video. Videos never see each other (the reference compares a video's
    first frame with the last frame of the video before it).

    Args:
        scores (`list[torch.Tensor]` of shape `(num_frames, num_windows)`): scores of each pruned video.
        similarities (`list[torch.Tensor]` of shape `(num_frames - 1, num_windows)`): see `neighbor_similarity`.

    Returns:
        `torch.Tensor`: a float32 scalar without weight; 0 where no video has a second frame.
    """
    errors = torch.cat([video[1:] for video in scores]) - (1 - torch.cat(similarities))
    return errors.square().sum() / max(1, errors.numel())
