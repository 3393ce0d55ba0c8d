"""The learned scorer: a score in (0, 1) for every window of a video, from this frame and the one before."""

import torch
from torch import nn
from torch.nn import functional as F

from .stts_attention import MAX_BATCH_SIZE


class SttsWindowPooler(nn.Module):
    """
    Attention-pools the patches of a window into one vector: the query is the window's mean patch, keys and values are
    its patches (paper section 3; reference `patch_token_pooler`). No mask, no residual, no norm.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim)
        self.k_proj = nn.Linear(hidden_size, num_heads * head_dim)
        self.v_proj = nn.Linear(hidden_size, num_heads * head_dim)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """
        Args:
            windows (`torch.Tensor` of shape `(num_windows, num_patches, hidden_size)`): patches of each window.

        Returns:
            `torch.Tensor` of shape `(num_windows, hidden_size)`.
        """
        query, key, value = (
            projection(patches).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, patches in (
                (self.q_proj, windows.mean(1, keepdim=True)),
                (self.k_proj, windows),
                (self.v_proj, windows),
            )
        )
        pooled = F.scaled_dot_product_attention(query, key, value)
        return self.o_proj(pooled.flatten(1))


class SttsScorerMLP(nn.Module):
    """Three linear layers with SiLU between them; two pooled windows in, one number out."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(2 * hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, intermediate_size)
        self.fc3 = nn.Linear(intermediate_size, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.silu(self.fc1(hidden_states))
        hidden_states = F.silu(self.fc2(hidden_states))
        return self.fc3(hidden_states)


class SttsScorer(nn.Module):
    """
    Scores the windows of videos (paper section 3; reference `temporal_token_scorer`).

    Args:
        hidden_size (`int`): size of a patch vector.
        num_heads (`int`): attention heads of the pooler, as the ViT's.
        head_dim (`int`): size of one head.
        intermediate_size (`int`): width of the MLP, as the ViT's.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, intermediate_size: int):
        super().__init__()
        self.window_pooler = SttsWindowPooler(hidden_size, num_heads, head_dim)
        self.mlp = SttsScorerMLP(hidden_size, intermediate_size)

    def forward(self, windows: torch.Tensor, num_frames: list[int], chunk_frames: int | None = None) -> torch.Tensor:
        """
        Args:
            windows (`torch.Tensor` of shape `(total_frames, num_windows, num_patches, hidden_size)`):
                Residual stream of all videos, one after the other, after block `score_after_layer`, without a norm.
            num_frames (`list[int]`): frames of each video.
            chunk_frames (`int`, *optional*): how many frames are worked on at once; all by default.

        Returns:
            `torch.Tensor` of shape `(total_frames, num_windows)`, float32: scores in (0, 1), higher = keep. The frame
            before the first one of a video counts as zeros.
        """
        size = len(windows) if chunk_frames is None else chunk_frames
        batches = windows.flatten(0, 1).split(min(size * windows.shape[1], MAX_BATCH_SIZE))
        pooled = torch.cat([self.window_pooler(batch) for batch in batches])
        pooled = pooled.unflatten(0, windows.shape[:2])
        zeros = torch.zeros_like(pooled[:1])
        previous = torch.cat([part for video in pooled.split(num_frames) for part in (zeros, video[:-1])])
        pairs = zip(previous.split(size), pooled.split(size))
        logits = torch.cat([self.mlp(torch.cat(pair, dim=-1)) for pair in pairs])
        # Scores that saturate in half precision would tie, and ties are cut by position.
        return logits.squeeze(-1).float().sigmoid()
