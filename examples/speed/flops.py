"""Floating-point operations of a prefill, counted by formula: 2 for each multiplication of its matrix products.

Only what the model needs counts: of attention, the pairs of a query and a key that may see each other. So the same
number holds for every way to compute it, and fused kernels, which a counter cannot look into, change nothing.
"""

import itertools

from transformers import Molmo2Config

from modeling_stts.stts_selection import plan_pruning


def linear(num_rows: float, *widths: int) -> float:
    """Of linear layers one after the other, the first from `widths[0]` to `widths[1]`."""
    return sum(2 * num_rows * before * after for before, after in itertools.pairwise(widths))


def attention(num_pairs: float, width: int) -> float:
    """Of logits and weighted values for pairs of query and key, all heads together `width` wide."""
    return 2 * 2 * num_pairs * width


def causal_pairs(num_tokens: int, num_vision_tokens: int) -> int:
    """Pairs in a prompt where text is causal and vision tokens see each other both ways."""
    return num_tokens * (num_tokens + 1) // 2 + num_vision_tokens * (num_vision_tokens - 1) // 2


def prefill_flops(config: Molmo2Config, num_frames: int, num_text_tokens: int, prune_ratio: float) -> dict[str, float]:
    """
    Of one prompt with one video, and logits of its last token.

    Args:
        config (`Molmo2Config`): shapes; with pruning it needs `stts_config`.
        num_frames (`int`): frames of the video, of 81 windows of 9 patches.
        num_text_tokens (`int`): other tokens of the prompt.
        prune_ratio (`float`): fraction of windows that is removed. All frames but the first lose equally many.

    Returns:
        `dict[str, float]` with `vit_linear`, `vit_attention`, `scorer`, `adapter`, `llm_linear`, `llm_attention`.
    """
    num_kept = plan_pruning([[num_frames, 9, 9]], prune_ratio).num_kept[0]
    vision = _vit(config, num_frames, num_kept) | {"scorer": _scorer(config, 81 * num_frames) if prune_ratio else 0.0}
    return vision | {"adapter": _adapter(config, num_kept)} | _llm(config, num_kept + num_text_tokens, num_kept)


def _vit(config: Molmo2Config, num_frames: int, num_kept: int) -> dict[str, float]:
    vit = config.vision_config
    width = vit.num_attention_heads * vit.head_dim
    patches, kept = 729 * num_frames, 9 * num_kept
    pairs = kept_pairs = 729 * patches
    num_dense = vit.num_hidden_layers
    if kept < patches:
        num_dense = config.stts_config.score_after_layer + 2
        kept_pairs = 729**2 + (kept - 729) ** 2 / (num_frames - 1)

    def block(rows):
        return (
            linear(rows, vit.hidden_size, 3 * width)
            + linear(rows, width, vit.hidden_size, vit.intermediate_size)
            + (linear(rows, vit.intermediate_size, vit.hidden_size))
        )

    num_pruned = vit.num_hidden_layers - num_dense
    embedding = linear(patches, 3 * vit.patch_size**2, vit.hidden_size)
    return {
        "vit_linear": embedding + num_dense * block(patches) + num_pruned * block(kept),
        "vit_attention": attention(num_dense * pairs + num_pruned * kept_pairs, width),
    }


def _scorer(config: Molmo2Config, windows: int) -> float:
    vit = config.vision_config
    width = vit.num_attention_heads * vit.head_dim
    pooler = linear(windows, vit.hidden_size, width, vit.hidden_size) + linear(9 * windows, vit.hidden_size, 2 * width)
    mlp = linear(windows, 2 * vit.hidden_size, vit.intermediate_size, vit.intermediate_size, 1)
    return pooler + attention(9 * windows, width) + mlp


def _adapter(config: Molmo2Config, windows: int) -> float:
    adapter = config.adapter_config
    width = adapter.num_attention_heads * adapter.head_dim
    features = config.vision_config.hidden_size * len(adapter.vision_feature_layer)
    pooling = linear(windows, features, width, adapter.hidden_size) + linear(9 * windows, features, 2 * width)
    projector = linear(windows, adapter.hidden_size, 2 * adapter.intermediate_size)
    projector += linear(windows, adapter.intermediate_size, adapter.text_hidden_size)
    return pooling + attention(9 * windows, width) + projector


def _llm(config: Molmo2Config, num_tokens: int, num_vision_tokens: int) -> dict[str, float]:
    text = config.text_config
    width, kv_width = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    block = linear(num_tokens, text.hidden_size, width + 2 * kv_width) + linear(num_tokens, width, text.hidden_size)
    block += linear(num_tokens, text.hidden_size, 2 * text.intermediate_size)
    block += linear(num_tokens, text.intermediate_size, text.hidden_size)
    pairs = causal_pairs(num_tokens, num_vision_tokens)
    return {
        "llm_linear": text.num_hidden_layers * block + linear(1, text.hidden_size, text.vocab_size),
        "llm_attention": text.num_hidden_layers * attention(pairs, width),
    }
