"""How alike neighbouring frames are, and the loss that teaches the scorer to see it."""

import torch
from torch.nn import functional as F


def neighbor_similarity(windows: torch.Tensor) -> torch.Tensor:
    """
    Cosine between each window and the same window one frame before, over the window's concatenated patches.

    Args:
        windows (`torch.Tensor` of shape `(num_frames, num_windows, num_patches, hidden_size)`): patches of one video.

    Returns:
        `torch.Tensor` of shape `(num_frames - 1, num_windows)`, float32, in [-1, 1]: row `f` compares frames `f` and
        `f + 1`. Gradients flow into both frames.
    """
    unit = F.normalize(windows.flatten(2).float(), dim=-1)
    return (unit[1:] * unit[:-1]).sum(-1)


def temporal_loss(scores: list[torch.Tensor], windows: list[torch.Tensor]) -> torch.Tensor:
    """
    Mean squared error between the scores and 1 - similarity to the frame before (paper section 3, loss of the
    scorer), over frames 1.. of every pruned video. Videos never see each other (the reference compares a video's
    first frame with the last frame of the video before it).

    Args:
        scores (`list[torch.Tensor]` of shape `(num_frames, num_windows)`): scores of each pruned video.
        windows (`list[torch.Tensor]` of shape `(num_frames, num_windows, num_patches, hidden_size)`):
            What the scores were computed from.

    Returns:
        `torch.Tensor`: a float32 scalar without weight; 0 where no video has a second frame.
    """
    errors = [
        (video_scores[1:] - (1 - neighbor_similarity(video_windows))).flatten()
        for video_scores, video_windows in zip(scores, windows)
    ]
    errors = torch.cat(errors)
    return errors.square().sum() / max(1, errors.numel())
