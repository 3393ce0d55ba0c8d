import pytest
import torch
from inputs import lively_model, video_inputs
from naive import attention_in_segments
from speed.flops import causal_pairs, prefill_flops
from test_modeling_molmo2_stts import native_twin
from torch.utils.flop_counter import FlopCounterMode

import modeling_stts.modeling_molmo2_stts_vision as vision_tower


LINEAR = (torch.ops.aten.mm, torch.ops.aten.addmm)


def count_linear(model, inputs, **kwargs):
    """What torch counts in the linear layers of a prefill."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1, **kwargs)
    return sum(counter.get_flop_counts()["Global"].get(operator, 0) for operator in LINEAR)


def formula_linear(config, inputs, prune_ratio):
    num_frames = len(inputs["pixel_values_videos"])
    num_text_tokens = int((inputs["mm_token_type_ids"] == 0).sum())
    parts = prefill_flops(config, num_frames, num_text_tokens, prune_ratio)
    # Without pairs of the scorer's and the adapter's attention: 9 keys for each window and head.
    vit, adapter = config.vision_config, config.adapter_config
    num_kept = 81 * num_frames if prune_ratio == 0 else 81 * num_frames - int(81 * prune_ratio * num_frames)
    scorer_attention = 4 * 9 * 81 * num_frames * vit.num_attention_heads * vit.head_dim
    adapter_attention = 4 * 9 * num_kept * adapter.num_attention_heads * adapter.head_dim
    linear = parts["vit_linear"] + parts["llm_linear"] + parts["adapter"] - adapter_attention
    return linear + (parts["scorer"] - scorer_attention if prune_ratio else 0)


def test_linear_layers_of_the_native_model_are_counted_as_torch_counts_them():
    model, inputs = lively_model(), video_inputs((3,))
    assert formula_linear(model.config, inputs, 0.0) == count_linear(native_twin(model), inputs)


@pytest.mark.parametrize("prune_ratio", [0.5, 0.6])
def test_linear_layers_of_a_pruned_prefill_are_counted_as_torch_counts_them(monkeypatch, prune_ratio):
    monkeypatch.setattr(vision_tower, "can_attend_in_segments", lambda hidden_states: True)
    monkeypatch.setattr(
        vision_tower,
        "attend_in_segments",
        lambda *states: attention_in_segments(*states[:3], states[3].diff().tolist()),
    )
    model, inputs = lively_model(), video_inputs((3,))
    counted = count_linear(model, inputs, prune_ratio=prune_ratio)
    assert formula_linear(model.config, inputs, prune_ratio) == counted


def test_attention_pairs_are_those_that_may_see_each_other():
    is_vision = torch.tensor([False, True, True, False, True, False, False, True])
    seen = torch.ones(8, 8, dtype=torch.bool).tril() | (is_vision[:, None] & is_vision)
    assert causal_pairs(8, 4) == seen.sum()


def test_attention_of_the_native_model_at_its_real_shapes():
    config = lively_model().config
    parts = prefill_flops(config, num_frames=2, num_text_tokens=10, prune_ratio=0.0)
    vit, text = config.vision_config, config.text_config
    assert parts["vit_attention"] == 4 * vit.num_hidden_layers * 2 * 729**2 * vit.num_attention_heads * vit.head_dim
    pairs = causal_pairs(172, 162)
    assert parts["llm_attention"] == 4 * text.num_hidden_layers * pairs * text.num_attention_heads * text.head_dim
    assert parts["scorer"] == 0
