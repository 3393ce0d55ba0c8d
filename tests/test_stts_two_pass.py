import itertools
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import sdpa_mask

from modeling_stts import stts_two_pass
from modeling_stts.stts_two_pass import (
    LENGTH_MULTIPLES,
    _tokens_first,
    attend_in_two_passes,
    find_kernel,
    lay_out_tokens,
    two_pass_attention_forward,
    two_pass_mask,
)


def attend_one_by_one(query, key, value, is_vision, is_real, scaling):
    """The attention of each real token by itself, over all it may see; zeros for padding."""
    rows = []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            kv_head = h * key.shape[1] // query.shape[1]
            for i in range(query.shape[2]):
                seen = [
                    j
                    for j in range(query.shape[2])
                    if is_real[b, j] and (j <= i or (is_vision[b, i] and is_vision[b, j]))
                ]
                logits = key[b, kv_head, seen] @ query[b, h, i] * scaling
                attended = logits.softmax(-1) @ value[b, kv_head, seen]
                rows.append(attended if is_real[b, i] else attended * 0)
    return torch.stack(rows).view_as(query)


def random_states(batch_size, length, num_heads=4, num_key_value_heads=2, head_dim=8, device="cpu"):
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(batch_size, length, heads, head_dim, generator=generator, dtype=torch.double)
        .to(device)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (num_heads, num_key_value_heads, num_key_value_heads)
    ]


@st.composite
def prompts(draw):
    """Rows of tokens, "v"ision, "t"ext and padding, padded on one side."""
    rows = draw(st.lists(st.text("vt", min_size=1, max_size=13), min_size=1, max_size=3))
    length, side = max(map(len, rows)), draw(st.sampled_from([str.ljust, str.rjust]))
    return [side(row, length) for row in rows]


class Passes(TorchDispatchMode):
    """Notes what the kernel of the CPU gets, forward and backward, what it returns, and whether that is finite."""

    def __init__(self):
        super().__init__()
        self.inputs, self.outputs, self.are_finite = [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if "flash_attention_for_cpu" in function.name():
            self.inputs.append([tensor for tensor in args if isinstance(tensor, torch.Tensor)])
            self.outputs.append(results)
            self.are_finite += [tensor.isfinite().all().item() for tensor in results]
        return results

    @property
    def shapes(self):
        """With the strides, which cuDNN plans for too."""
        return [[(tuple(tensor.shape), tensor.stride()) for tensor in call] for call in self.inputs]


def multiple_of(multiple):
    """Has the CPU attend to multiples of some number of tokens only."""
    return mock.patch.dict(LENGTH_MULTIPLES, cpu=multiple)


@settings(deadline=None, max_examples=60)
@given(prompts(), st.sampled_from([1, 2, 4, 8]))
@example(["vvvv", "vttt"], 4)
@example(["vvvvvv", "    vv"], 4)
@example(["tvvvvvvvt"], 8)
def test_values_and_gradients_equal_the_naive_twin(rows, multiple):
    is_vision = torch.tensor([[token == "v" for token in row] for row in rows])
    is_real = torch.tensor([[token != " " for token in row] for row in rows])
    states = random_states(*is_vision.shape)
    with multiple_of(multiple):
        layout = lay_out_tokens("cpu", is_vision, is_real.long())
    with Passes() as passes:
        output = attend_in_two_passes(*states, layout, 0.3)
        torch.autograd.grad(output.sum(), states, retain_graph=True)
    assert all(tensor.shape[2] % multiple == 0 for call in passes.inputs for tensor in call)
    assert all(passes.are_finite)
    expected = attend_one_by_one(*states, is_vision, is_real, 0.3)
    real = is_real[:, None, :, None].expand_as(output)
    torch.testing.assert_close(output[real], expected[real])
    weight = torch.randn_like(expected) * real
    ours, naive = (torch.autograd.grad((result * weight).sum(), states) for result in (output, expected))
    for mine, other in zip(ours, naive):
        torch.testing.assert_close(mine, other)


def test_float32_at_an_odd_size():
    is_vision = torch.rand(2, 67, generator=torch.Generator().manual_seed(0)) < 0.8
    states = random_states(2, 67)
    expected = attend_one_by_one(*states, is_vision, torch.ones_like(is_vision), 0.25)
    states = [tensor.detach().float() for tensor in states]
    output = attend_in_two_passes(*states, lay_out_tokens("cpu", is_vision), 0.25)
    torch.testing.assert_close(output, expected.float(), atol=1e-5, rtol=1e-4)


def test_vision_tokens_that_the_mask_hides_are_padding():
    is_vision, mask = torch.ones(1, 5, dtype=torch.bool), torch.tensor([[0, 0, 1, 1, 1]])
    layout = lay_out_tokens("cpu", is_vision, mask)
    assert layout.order.tolist() == [[2, 3, 4, 0, 1]] and layout.vision_idx.tolist() == [[2, 1, 0, 2]]


@pytest.mark.parametrize("mask", [[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]])
def test_hidden_tokens_between_others_have_no_layout(mask):
    assert lay_out_tokens("cpu", torch.ones(1, 5, dtype=torch.bool), torch.tensor([mask])) is None


def test_nothing_is_moved_where_nothing_needs_to_be():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    layout = lay_out_tokens("cpu", torch.zeros(2, 5, dtype=torch.bool), mask)
    assert layout[1:] == (5, None, None, None, None, None)


@pytest.mark.parametrize(
    ("kernel", "length", "num_vision", "expected"),
    [
        ("flash", 257, 255, (257, 255)),
        ("cpu", 257, 255, (257, 255)),
        ("cudnn", 255, 2, (256, 256)),
        ("cudnn", 256, 256, (256, 256)),
        ("cudnn", 257, 256, (512, 256)),
        ("cudnn", 5845, 5184, (5888, 5376)),
    ],
)
def test_both_passes_have_multiples_of_256_tokens_for_cudnn_only(kernel, length, num_vision, expected):
    layout = lay_out_tokens(kernel, torch.arange(length)[None] < num_vision)
    assert (layout.padded_length, layout.is_filler.shape[1]) == expected
    queries, keys = layout.vision_idx[0, 1:], layout.vision_idx[0, :-1]
    assert len(queries.unique()) == len(keys.unique()) == expected[1] and layout.vision_idx.max() < expected[0]


@pytest.mark.parametrize("multiple", [1, 8])
def test_queries_without_a_second_pass_stay_finite_whatever_their_logits(multiple):
    is_vision = torch.tensor([[True] * 5, [False] * 5])
    states = [(100 * tensor.detach()).requires_grad_() for tensor in random_states(2, 5)]
    with multiple_of(multiple):
        output = attend_in_two_passes(*states, lay_out_tokens("cpu", is_vision), 0.3)
    expected = attend_one_by_one(*states, is_vision, torch.ones_like(is_vision), 0.3)
    torch.testing.assert_close(output, expected)
    for mine, other in zip(*(torch.autograd.grad(result.square().sum(), states) for result in (output, expected))):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_prompts_between_two_multiples_look_the_same_to_the_kernel(num_rows):
    seen = []
    # As without a cache, after a dynamic cache, from a static cache.
    for length, arrange in ((17, _tokens_first), (19, heads_first), (24, _tokens_first), (23, part_of_a_row)):
        is_vision = torch.arange(length).expand(num_rows, -1) % 8 > 2
        states = [arrange(tensor.detach()).requires_grad_() for tensor in random_states(num_rows, length)]
        with multiple_of(8), Passes() as passes:
            output = attend_in_two_passes(*states, lay_out_tokens("cpu", is_vision), 0.3)
            torch.autograd.grad(output.square().sum(), states)
        assert output.shape == states[0].shape and len(passes.inputs) == 4
        seen.append(passes.shapes)
    assert seen.count(seen[0]) == 4


def test_a_multiple_is_not_moved():
    states = random_states(2, 16)
    with multiple_of(8), Passes() as passes:
        output = attend_in_two_passes(*states, lay_out_tokens("cpu", torch.zeros(2, 16, dtype=torch.bool)), 0.3)
    assert [tensor.data_ptr() for tensor in passes.inputs[0]] == [tensor.data_ptr() for tensor in states]
    assert output.data_ptr() == passes.outputs[0][0].data_ptr()


def test_compiled_passes_agree():
    torch.compiler.reset()
    compiled = torch.compile(attend_in_two_passes, backend="aot_eager", fullgraph=True)
    for rows in (["vvvttv"], ["vvvtt", "   vv"]):
        is_vision, is_real = (torch.tensor([[t in kinds for t in row] for row in rows]) for kinds in ("v", "vt"))
        states = random_states(*is_vision.shape)
        with multiple_of(8):
            layout = lay_out_tokens("cpu", is_vision, is_real)
        outputs = [function(*states, layout, 0.3) for function in (attend_in_two_passes, compiled)]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*(torch.autograd.grad(output.sum(), states) for output in outputs))


def test_the_cpu_has_no_kernel_by_default():
    assert find_kernel(torch.device("cpu"), torch.bfloat16, 4, 2, 16) is None


def test_without_a_layout_it_is_sdpa():
    states = [tensor.detach() for tensor in random_states(1, 6, num_key_value_heads=4)]
    module = torch.nn.Module()
    output, _ = two_pass_attention_forward(module, *states, None, scaling=0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(*states, is_causal=True, scale=0.5)
    assert torch.equal(output, expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_what_torch_makes_of_that_of_sdpa(dtype):
    shape = {"batch_size": 2, "q_length": 5, "kv_length": 5, "allow_is_causal_skip": False}
    padding = torch.tensor([[False, False, True, True, True], [True] * 5])
    mask, expected = (function(**shape, attention_mask=padding) for function in (two_pass_mask, sdpa_mask))
    assert mask.dtype == torch.float32 and torch.equal(mask == 0, expected) and (mask[~expected] == -torch.inf).all()
    states = [tensor.detach().to(dtype) for tensor in random_states(2, 5, num_key_value_heads=4)]
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = two_pass_mask(dtype, **shape, attention_mask=padding)
    assert torch.equal(attend(*states, attn_mask=mask), attend(*states, attn_mask=expected))
    assert two_pass_mask(dtype, **shape | {"q_length": 1, "allow_is_causal_skip": True}) is None


def empty_states(device, num_queries, num_heads=4, head_dim=64):
    """Of some queries and seven keys, for a device that need not be there."""
    return [
        torch.empty(2, heads, length, head_dim, device=device, dtype=torch.bfloat16)
        for heads, length in zip((num_heads, 2, 2), (num_queries, 7, 7))
    ]


@pytest.mark.parametrize(
    ("change", "is_flash"),
    [
        ({}, True),
        ({"num_queries": 2}, False),
        ({"head_dim": 36}, False),
        ({"device": "cpu"}, False),
        ({"attention_mask": "any"}, False),
        ({"dropout": 0.1}, False),
    ],
    ids=str,
)
def test_a_decoding_step_needs_no_plan(monkeypatch, change, is_flash):
    monkeypatch.setattr(stts_two_pass, "can_use_flash_attention", lambda params: True)
    monkeypatch.setattr(stts_two_pass, "sdpa_attention_forward", lambda *args, **kwargs: ("sdpa", None))
    call = {"num_queries": 1, "head_dim": 64, "device": "cuda", "attention_mask": None, "dropout": 0.0} | change
    with FakeTensorMode():
        states = empty_states(call["device"], call["num_queries"], head_dim=call["head_dim"])
        settings = {"scaling": 0.1, "dropout": call["dropout"]}
        output, _ = two_pass_attention_forward(torch.nn.Module(), *states, call["attention_mask"], **settings)
    assert output.shape == (2, 1, 4, 64) if is_flash else output == "sdpa"


@pytest.mark.parametrize(
    ("change", "is_grouped"),
    [
        ({}, True),
        ({"num_queries": 7}, True),
        ({"num_queries": 1}, False),
        ({"num_heads": 2}, False),
        ({"device": "cpu"}, False),
        ({"requires_grad": True}, False),
        ({"dropout": 0.1}, False),
    ],
    ids=str,
)
def test_a_mask_needs_no_copies_of_keys_and_values(monkeypatch, change, is_grouped):
    monkeypatch.setattr(stts_two_pass, "can_use_cudnn_attention", lambda params: True)
    monkeypatch.setattr(stts_two_pass, "sdpa_attention_forward", lambda *args, **kwargs: ("sdpa", None))
    call = {"num_queries": 5, "num_heads": 4, "device": "cuda", "requires_grad": False, "dropout": 0.0} | change
    with FakeTensorMode():
        states = empty_states(call["device"], call["num_queries"], num_heads=call["num_heads"])
        states[2].requires_grad_(call["requires_grad"])
        mask = torch.zeros(2, 1, call["num_queries"], 7, device=call["device"], dtype=torch.bfloat16)
        output, _ = two_pass_attention_forward(torch.nn.Module(), *states, mask, dropout=call["dropout"])
    assert output.shape == (2, call["num_queries"], 4, 64) if is_grouped else output == "sdpa"


def heads_first(states):
    return states.contiguous()


def part_of_a_row(states):
    """As from a projection to several things at once, with tokens first."""
    return _tokens_first(torch.cat([states, states], dim=1))[:, : states.shape[1]]


LAYOUTS = (_tokens_first, heads_first, part_of_a_row)


def check_layouts(kernel, length, dtype, head_dim, tolerance, device):
    """Values and gradients of states, and of gradients of the output, in every layout, one after the other."""
    generator = torch.Generator().manual_seed(0)
    mostly_vision = torch.rand(2, length, generator=generator) < 0.9
    exact = random_states(2, length, 4, 2, head_dim, device)
    weight = torch.randn(exact[0].shape, generator=generator, dtype=torch.double).to(device)
    for is_vision in (mostly_vision, torch.zeros_like(mostly_vision)):
        seen = torch.ones(length, length).tril().bool() | (is_vision[:, :, None] & is_vision[:, None])
        expected = torch.nn.functional.scaled_dot_product_attention(
            *exact, attn_mask=seen[:, None].to(device), scale=0.1, enable_gqa=True
        )
        expected = (expected, *torch.autograd.grad(expected, exact, weight))
        layout = lay_out_tokens(kernel, is_vision.to(device))
        for *of_states, of_gradient in itertools.product(LAYOUTS, repeat=4):
            states = [arrange(tensor.detach().to(dtype)) for arrange, tensor in zip(of_states, exact)]
            states = [tensor.requires_grad_() for tensor in states]
            output = attend_in_two_passes(*states, layout, 0.1)
            ours = (output, *torch.autograd.grad(output, states, of_gradient(weight.to(dtype))))
            for mine, other in zip(ours, expected):
                assert (mine.double() - other).norm() / other.norm() < tolerance


def test_layouts_in_memory_change_nothing():
    check_layouts("cpu", 160, torch.float32, 8, 1e-5, "cpu")


def test_states_with_tokens_first_are_not_copied():
    states = torch.randn(2, 5, 3, 4).transpose(1, 2)
    assert _tokens_first(states).data_ptr() == states.data_ptr()
    for arrange in (heads_first, part_of_a_row):
        other = arrange(states)
        assert other.stride() != states.stride() == _tokens_first(other).stride()
        assert torch.equal(_tokens_first(other), states)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
@pytest.mark.parametrize("length", [160, 256])
def test_layouts_in_memory_change_nothing_on_cuda(kernel, length):
    if kernel == "cudnn" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper")
    check_layouts(kernel, length, torch.bfloat16, 128, 1e-2, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [333, 1021, 1024])
def test_kernels_of_cuda_agree_with_float64(kernel, side, length):
    if kernel == "cudnn" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper")
    generator = torch.Generator().manual_seed(length)
    is_vision = torch.rand(2, length, generator=generator) < 0.9
    is_real = torch.ones_like(is_vision)
    (is_real[1, :100] if side == "left" else is_real[1, -100:]).fill_(False)
    exact = random_states(2, length, 8, 2, 128, device="cuda")
    seen = is_real[:, None] & (torch.ones(length, length).tril().bool() | (is_vision[:, :, None] & is_vision[:, None]))
    real = is_real[:, None, :, None].cuda()
    expected = torch.nn.functional.scaled_dot_product_attention(
        *exact, attn_mask=seen[:, None].cuda(), scale=0.1, enable_gqa=True
    )
    states = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    layout = lay_out_tokens(kernel, is_vision.cuda(), is_real.cuda())
    output = attend_in_two_passes(*states, layout, 0.1)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.double).cuda() * real
    ours = torch.autograd.grad(output, states, weight.bfloat16())
    others = torch.autograd.grad((expected.nan_to_num() * weight).sum(), exact)
    assert output.isfinite().all()
    for mine, other in zip((output * real, *ours), (expected.nan_to_num() * real, *others)):
        assert (mine.double() - other).norm() / other.norm() < 1e-2


@pytest.mark.gpu
def test_a_decoding_step_on_cuda_agrees_with_float64():
    query, key, value = random_states(2, 1021, 8, 2, 128, device="cuda")
    exact = query[:, :, -1:], key, value
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, scale=0.1, enable_gqa=True)
    states = [tensor.bfloat16() for tensor in exact]
    assert stts_two_pass._can_decode_without_plan(*states)
    with torch.no_grad():
        output, _ = two_pass_attention_forward(torch.nn.Module(), *states, None, scaling=0.1)
    assert (output.transpose(1, 2).double() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.gpu
def test_a_hopper_gpu_uses_cudnn_and_others_flash():
    expected = "cudnn" if torch.cuda.get_device_capability() >= (9, 0) else "flash"
    assert find_kernel(torch.device("cuda"), torch.bfloat16, 32, 8, 128) == expected
    assert find_kernel(torch.device("cuda"), torch.float32, 32, 8, 128) is None


@pytest.mark.gpu
@pytest.mark.parametrize("num_queries", [700, 5])
def test_a_mask_on_cuda_needs_no_copies_of_keys_and_values(num_queries):
    query, key, value = random_states(2, 700, 8, 2, 128, device="cuda")
    states = [tensor.detach().bfloat16() for tensor in (query[:, :, -num_queries:], key, value)]
    seen = torch.rand(2, 1, num_queries, 700, device="cuda") < 0.7
    mask = torch.where(seen, 0.0, -torch.inf).bfloat16()
    assert stts_two_pass._can_group_heads(*states, mask) == (torch.cuda.get_device_capability() >= (9, 0))
    output, _ = two_pass_attention_forward(torch.nn.Module(), *states, mask, scaling=0.1)
    exact = [tensor.double() for tensor in states]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=seen, scale=0.1, enable_gqa=True)
    assert (output.transpose(1, 2).double() - expected).norm() / expected.norm() < 1e-2
