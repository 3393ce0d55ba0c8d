import math

import pytest
import torch
from naive import attention_in_segments, key_bias

from modeling_stts.stts_attention import (
    attend_in_segments,
    attend_with_key_bias,
    attend_with_mask,
    can_attend_in_segments,
    score_to_key_bias,
)


def test_key_bias_of_a_hand_made_row():
    scores = torch.tensor([[[0.2, 0.9, 0.4]], [[0.2, 0.7, 0.45]]])
    bias = score_to_key_bias(scores, [len(scores)], bias_floor=-2.0)
    low = math.exp(-2)
    assert bias[0].tolist() == [[0, 0, 0]]
    expected = torch.tensor([-2.0, 0.0, math.log(low + 0.5 * (1 - low))])
    assert torch.allclose(bias[1, 0], expected, atol=1e-5)


def test_a_constant_row_gets_the_floor():
    bias = score_to_key_bias(torch.full((2, 9, 9), 0.3), [2], bias_floor=-1.5)
    assert torch.allclose(bias[1], torch.full((9, 9), -1.5))


def test_key_bias_and_gradients_equal_the_naive_twin():
    scores = torch.rand(3, 81, dtype=torch.double, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours = score_to_key_bias(scores.unflatten(1, (9, 9)), [len(scores)], -2.0)
    naive = key_bias(scores).view(3, 27, 27)[:, ::3, ::3]
    torch.testing.assert_close(ours, naive)
    weight = torch.rand(3, 9, 9, dtype=torch.double)
    mine, other = (torch.autograd.grad((bias * weight).sum(), scores)[0] for bias in (ours, naive))
    torch.testing.assert_close(mine, other)


def test_bool_mask_of_segments_equals_attention_segment_by_segment():
    lengths = [9, 18, 27]
    query, key, value = torch.randn(3, 1, 2, 54, 8)
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    output = attend_with_mask(query, key, value, segment[:, None] == segment)
    torch.testing.assert_close(output, attention_in_segments(query, key, value, lengths))


@pytest.mark.parametrize("head_dim", [5, 8, 72])
def test_a_key_bias_is_an_additive_mask(head_dim):
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 3, 13, head_dim, generator=generator, dtype=torch.double) for _ in range(4)]
    key_bias = -2 * torch.rand(2, 13, generator=generator, dtype=torch.double)
    *states, weight = (tensor.requires_grad_() for tensor in states)
    key_bias.requires_grad_()
    output = attend_with_key_bias(*states, key_bias)
    expected = attend_with_mask(*states, key_bias[:, None, None])
    torch.testing.assert_close(output, expected)
    inputs = (*states, key_bias)
    ours, others = (torch.autograd.grad((result * weight).sum(), inputs) for result in (output, expected))
    for mine, other in zip(ours, others):
        torch.testing.assert_close(mine, other)


def test_segments_are_for_half_precision_on_cuda_only():
    assert not can_attend_in_segments(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[729, 9, 360], [0, 81, 0, 0, 9], [5]])
def test_varlen_equals_per_frame_attention(dtype, lengths):
    states = torch.randn(3, 1, 4, sum(lengths), 72, device="cuda", dtype=dtype, requires_grad=True)
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    assert can_attend_in_segments(states)
    output = attend_in_segments(*states, cu_seqlens, 729)
    reference = states.detach().cpu().double().requires_grad_()
    expected = attention_in_segments(*reference, lengths)
    relative = (output.detach().cpu().double() - expected).norm() / expected.norm()
    assert relative < 1e-2
    weight = torch.randn_like(expected)
    (output * weight.to(output)).sum().backward()
    (expected * weight).sum().backward()
    assert (states.grad.cpu().double() - reference.grad).norm() / reference.grad.norm() < 2e-2


@pytest.mark.gpu
def test_a_key_bias_takes_the_memory_of_the_keys_and_not_of_all_pairs():
    states = torch.randn(3, 1, 4, 4096, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key_bias = (-2 * torch.rand(1, 4096, device="cuda")).requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = attend_with_key_bias(*states, key_bias)
    output.float().square().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * 4096 * 4096 * 2
    exact, exact_bias = states.detach().double().requires_grad_(), key_bias.detach().double().requires_grad_()
    expected = attend_with_mask(*exact, exact_bias[:, None, None])
    expected.square().sum().backward()
    pairs = ((output, expected), (states.grad, exact.grad), (key_bias.grad, exact_bias.grad))
    for mine, other in pairs:
        assert (mine.double() - other).norm() / other.norm() < 2e-2
