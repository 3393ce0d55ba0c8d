"""Attention of the ViT under pruning: the key bias that lets gradients reach the scorer, and attention in segments."""

import math

import torch
from torch.nn import functional as F
from transformers.utils.import_utils import is_torch_greater_or_equal


_HAS_VARLEN = is_torch_greater_or_equal("2.10")
if _HAS_VARLEN:
    from torch.nn.attention.varlen import varlen_attn

# CUDA's attention kernels take no larger batches (https://github.com/pytorch/pytorch/issues/146704), and windows are
# pooled as a batch: 809 frames of 81 windows.
MAX_BATCH_SIZE = 65535


def score_to_key_bias(scores: torch.Tensor, num_frames: list[int], bias_floor: float) -> torch.Tensor:
    """
    Turns the scores of videos into additive biases on the attention logits of the keys: the logarithm of the scores,
    rescaled to `[exp(bias_floor), 1]` by minimum and maximum of each row of a frame. A constant row gets `bias_floor`,
    the first frame of a video 0. Row-wise and with 1e-6 in the denominator, because the published checkpoints were
    trained so (reference `rescale`).

    Args:
        scores (`torch.Tensor` of shape `(total_frames, num_rows, num_cols)`): in (0, 1), of all videos in order.
        num_frames (`list[int]`): frames of each video.
        bias_floor (`float`): the lowest bias, below 0.

    Returns:
        `torch.Tensor` of the same shape, in `[bias_floor, 0]`. Gradients flow through minimum and maximum too.
    """
    low = math.exp(bias_floor)
    smallest, largest = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    rescaled = low + (scores - smallest) * (1 - low) / (largest - smallest + 1e-6)
    zeros = torch.zeros_like(scores[:1])
    return torch.cat([part for video in rescaled.log().split(num_frames) for part in (zeros, video[1:])])


def can_attend_in_segments(hidden_states: torch.Tensor) -> bool:
    """Whether variable-length attention exists for this tensor's device and dtype in the installed torch."""
    return (
        _HAS_VARLEN
        and hidden_states.is_cuda
        and hidden_states.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(hidden_states.device) >= (8, 0)
    )


def attend_in_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """
    Bidirectional attention within the segments of one flat sequence, scaled by `head_dim ** -0.5`.

    Args:
        query, key, value (`torch.Tensor` of shape `(1, num_heads, total, head_dim)`): float16 or bfloat16 on CUDA.
        cu_seqlens (`torch.Tensor` of shape `(num_segments + 1,)`, int32): where segments start, and the total.
        max_seqlen (`int`): an upper bound of a segment's length.

    Returns:
        `torch.Tensor` of shape `(1, num_heads, total, head_dim)`.
    """
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    output = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return output.transpose(0, 1)[None]


def attend_with_key_bias(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_bias: torch.Tensor
) -> torch.Tensor:
    """
    Attention with a bias for each key, scaled by `head_dim ** -0.5`. The bias becomes part of the keys, in columns
    where all queries are 1. As an additive mask, its gradient would be as large as all attention weights.

    Args:
        query, key, value (`torch.Tensor` of shape `(batch_size, num_heads, sequence_length, head_dim)`).
        key_bias (`torch.Tensor` of shape `(batch_size, sequence_length)`).

    Returns:
        `torch.Tensor` of the query's shape.
    """
    head_dim = query.shape[-1]
    scale = head_dim**-0.5
    # Fast kernels want one head size for all three, a multiple of 8.
    num_columns = 8 - head_dim % 8
    column = (key_bias / (scale * num_columns))[:, None, :, None].to(key.dtype)
    key = torch.cat([key, column.expand(*key.shape[:3], num_columns)], dim=-1)
    query, value = F.pad(query, (0, num_columns), value=1.0), F.pad(value, (0, num_columns))
    return F.scaled_dot_product_attention(query, key, value, scale=scale)[..., :head_dim]


def attend_with_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """
    Attention with a mask, scaled by `head_dim ** -0.5`; every device and dtype has it.

    Args:
        query, key, value (`torch.Tensor` of shape `(batch_size, num_heads, sequence_length, head_dim)`).
        attention_mask (`torch.Tensor` that broadcasts to `(batch_size, num_heads, sequence_length, sequence_length)`):
            bool, True = attend. A query without any key gets zeros.

    Returns:
        `torch.Tensor` of the query's shape.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
