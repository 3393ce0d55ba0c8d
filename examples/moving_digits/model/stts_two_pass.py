"""Attention of a language model whose text is causal and whose vision tokens see each other both ways, without a mask.

What a token may see is everything up to itself, and for a vision token also the vision tokens after it. The first is
causal attention over the prompt. The second is causal attention too, over the vision tokens in reverse order and
without the diagonal. Two passes of a causal kernel, merged by their log-sum-exps, therefore compute exactly the pairs
that are needed, in memory that grows with the number of tokens. Padding stands behind all tokens in both passes, where
causality hides it. In the backward pass each kernel gets the merged output and log-sum-exp, which makes its gradients
those of the whole attention.

A kernel that plans for every new length gets few lengths to see: behind its tokens, each pass goes on to a multiple
of a constant.
"""

from typing import NamedTuple

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


IMPLEMENTATION = "sdpa_two_pass"

# `scaled_dot_product_attention` itself does not return log-sum-exps; these are the operators it calls.
aten = torch.ops.aten

# What the number of tokens in a pass is a multiple of. For every new one cuDNN plans 55 to 90 ms (H100, torch 2.11).
LENGTH_MULTIPLES = {"cudnn": 256, "flash": 1, "cpu": 1}


class TokenLayout(NamedTuple):
    """
    Where the tokens of a batch of prompts stand in the two passes. Made by `lay_out_tokens`. Indices point into the
    tokens of all rows, one row after the other.

    kernel (`str`): what computes a pass, see `find_kernel`.
    padded_length (`int`): tokens of a row in the first pass, `sequence_length` or more.
    order (`torch.Tensor` of shape `(batch_size, padded_length)`, int64): the tokens of each row, padding last; `None`
        where they stand so already.
    inverse_order (`torch.Tensor` of shape `(batch_size, sequence_length)`, int64): leads back; `None` where that is
        cutting off what `order` has added.
    vision_idx (`torch.Tensor` of shape `(batch_size, num_keys + 1)`, int64): the vision tokens of each row from the
        last to the first, among tokens of the first pass; behind them as many others as the second pass needs; and the
        first of all again. The second pass has all but the last as keys, all but the first as queries. `None` where
        no row has two vision tokens.
    is_filler (`torch.Tensor` of shape `(batch_size, num_keys)`, bool): which of the queries are to see nothing there.
    moved_idx (`torch.Tensor` of shape `(num_moved,)`, int64): the tokens of both passes that are moved, in one index:
        `order`, if there is one, and the tokens of `vision_idx`, if there are any.
    """

    kernel: str
    padded_length: int
    order: torch.Tensor | None = None
    inverse_order: torch.Tensor | None = None
    vision_idx: torch.Tensor | None = None
    is_filler: torch.Tensor | None = None
    moved_idx: torch.Tensor | None = None


def find_kernel(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_key_value_heads: int, head_dim: int
) -> str | None:
    """
    Which kernel of torch computes a pass on this device: `"cudnn"` (faster, from Hopper on), `"flash"`, or `None`.
    `torch.nn.attention.sdpa_kernel` restricts the choice.

    Args:
        device (`torch.device`), dtype (`torch.dtype`): of the states; under autocast its dtype counts.
        num_heads (`int`), num_key_value_heads (`int`), head_dim (`int`): their shape.
    """
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 != 0:
        return None
    query = torch.empty(1, num_heads, 128, head_dim, device=device, dtype=dtype)
    key = query[:, :num_key_value_heads]
    params = SDPAParams(query, key, key, None, 0.0, True, num_heads != num_key_value_heads)
    if torch.cuda.get_device_capability(device) >= (9, 0) and can_use_cudnn_attention(params):
        return "cudnn"
    return "flash" if can_use_flash_attention(params) else None


@torch.compiler.disable
def lay_out_tokens(
    kernel: str, is_vision: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> TokenLayout | None:
    """
    Finds out where the tokens of a batch of prompts stand. Waits for the device once.

    Args:
        kernel (`str`): see `find_kernel`; `"cpu"` for tensors on the CPU.
        is_vision (`torch.Tensor` of shape `(batch_size, sequence_length)`, bool): which tokens are vision tokens.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 = padding.

    Returns:
        `TokenLayout`, or `None` where the mask hides tokens between others, or a whole row.
    """
    batch_size, length = is_vision.shape
    multiple = LENGTH_MULTIPLES[kernel]
    padded_length = _round_up(length, multiple)
    position = torch.arange(padded_length, device=is_vision.device)
    row = torch.arange(batch_size, device=is_vision.device)[:, None]
    is_real = torch.ones_like(is_vision) if attention_mask is None else attention_mask.bool()
    is_vision, is_real = (F.pad(flags, (0, padded_length - length)) for flags in (is_vision & is_real, is_real))
    num_before = is_real.byte().argmax(-1)
    num_behind = is_real.flip(-1).byte().argmax(-1)
    num_hidden = padded_length - is_real.sum(-1) - num_before - num_behind
    counts = torch.stack([num_before, num_hidden, is_vision.sum(-1)]).tolist()
    if any(counts[1]):
        return None

    order = inverse_order = moved_idx = None
    if any(counts[0]) or padded_length > length:
        order = (position + num_before[:, None]) % padded_length
        if any(counts[0]):
            inverse_order = (position[:length] - num_before[:, None]) % padded_length + row * padded_length
        # What fills a row up are copies of its last token: kernels multiply what is hidden by 0, so it must be finite.
        is_vision, order = is_vision.gather(1, order), order.clamp(max=length - 1) + row * length
        moved_idx = order.flatten()
    if max(counts[2]) < 2:
        return TokenLayout(kernel, padded_length, order, inverse_order, moved_idx=moved_idx)
    num_keys = _round_up(max(counts[2]), multiple)
    backwards = is_vision.flip(-1).byte().argsort(dim=-1, descending=True, stable=True)[:, :num_keys]
    vision_idx = padded_length - 1 - torch.cat([backwards, backwards[:, :1]], dim=1) + row * padded_length
    is_filler = position[:num_keys] >= is_vision.sum(-1, keepdim=True) - 1
    vision_tokens = vision_idx.flatten()
    moved_idx = vision_tokens if order is None else torch.cat([moved_idx, moved_idx[vision_tokens]])
    return TokenLayout(kernel, padded_length, order, inverse_order, vision_idx, is_filler, moved_idx)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def attend_in_two_passes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: TokenLayout, scaling: float
) -> torch.Tensor:
    """
    Attention in which a token sees the tokens up to itself, and a vision token all vision tokens of its row.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, sequence_length, head_dim)`).
        key, value (`torch.Tensor` of shape `(batch_size, num_key_value_heads, sequence_length, head_dim)`).
        layout (`TokenLayout`): of the same batch.
        scaling (`float`): factor of the attention logits.

    Returns:
        `torch.Tensor` of the query's shape. Padding has values without meaning.
    """
    return _TwoPasses.apply(query, key, value, layout, scaling)


def _rows(states: torch.Tensor) -> torch.Tensor:
    """`(batch_size, num_heads, sequence_length, ...)` as `(batch_size * sequence_length, num_heads, ...)`."""
    return states.transpose(1, 2).flatten(0, 1)


def _from_rows(rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Back from `_rows`."""
    return rows.unflatten(0, (batch_size, -1)).transpose(1, 2)


def _take(states: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """The tokens at `idx`, of shape `(batch_size, num_taken)`, of states with heads before tokens."""
    return _from_rows(_rows(states)[idx.flatten()], len(idx))


def _tokens_first(states: torch.Tensor) -> torch.Tensor:
    """The same states with tokens before heads in memory, where they mostly stand so already."""
    return states.transpose(1, 2).contiguous().transpose(1, 2)


def _put(states: torch.Tensor, idx: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The same states with other values for the tokens at `idx`. May change the given ones."""
    return _from_rows(_rows(states).index_copy_(0, idx.flatten(), _rows(values)), len(states))


def _move(
    states: tuple[torch.Tensor, ...], layout: TokenLayout
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | None]:
    """Query, key and value of the first pass and of the second, if there is one, in one gather for both."""
    if layout.moved_idx is None:
        return states, None
    batch_size, num_first = len(states[0]), 0 if layout.order is None else layout.order.numel()
    moved = [_rows(tensor)[layout.moved_idx] for tensor in states]
    if layout.order is not None:
        states = tuple(_from_rows(rows[:num_first], batch_size) for rows in moved)
    if layout.vision_idx is None:
        return states, None
    query, key, value = (_from_rows(rows[num_first:], batch_size) for rows in moved)
    return states, (query[:, :, 1:], key[:, :, :-1], value[:, :, :-1])


def _move_back(states: torch.Tensor, layout: TokenLayout, length: int) -> torch.Tensor:
    """From the first pass to where the tokens stand in the prompt."""
    if layout.inverse_order is not None:
        return _take(states, layout.inverse_order)
    return states.transpose(1, 2)[:, :length].transpose(1, 2)


def _move_gradient(grad_output: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """To where the tokens stand in the first pass; zeros for what is not in the prompt."""
    if layout.order is None:
        return grad_output
    grad_output = grad_output.transpose(1, 2)
    batch_size, length, *heads = grad_output.shape
    moved = grad_output.new_zeros(batch_size, layout.padded_length, *heads)
    if layout.inverse_order is None:
        moved[:, :length] = grad_output
        return moved.transpose(1, 2)
    return _put(moved.transpose(1, 2), layout.inverse_order, grad_output.transpose(1, 2))


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, layout, scaling):
        first, second = _move((query, key, value), layout)
        output, lse, *rng_states = _causal_attention(layout.kernel, *first, scaling)
        if second is not None:
            queries = layout.vision_idx[:, 1:]
            later, lse_of_later, *_ = _causal_attention(layout.kernel, *second, scaling)
            lse_so_far = _take(lse, queries)
            lse_of_later.masked_fill_(layout.is_filler[:, None], -torch.inf)
            weight = (lse_of_later - lse_so_far).sigmoid()[..., None].to(output.dtype)
            output = _put(output, queries, torch.lerp(_take(output, queries), later, weight))
            if any(ctx.needs_input_grad):
                lse = _put(lse, queries, torch.logaddexp(lse_so_far, lse_of_later))
        ctx.save_for_backward(query, key, value, output, lse, *rng_states)
        ctx.layout, ctx.scaling = layout, scaling
        return _move_back(output, layout, query.shape[2])

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, output, lse, *rng_states = ctx.saved_tensors
        layout = ctx.layout
        passed = (layout.kernel, ctx.scaling, rng_states)
        first, second = _move((query, key, value), layout)
        grad_output = _move_gradient(grad_output, layout)
        grads = _causal_attention_backward(*passed, grad_output, *first, output, lse)
        if second is not None:
            queries, keys = layout.vision_idx[:, 1:], layout.vision_idx[:, :-1]
            # `masked_fill_` of moved tokens is not compiled, `masked_fill` puts heads first.
            grad_output = torch.where(layout.is_filler[:, None, :, None], 0.0, _take(grad_output, queries))
            lse = _take(lse, queries).masked_fill(layout.is_filler[:, None], torch.inf)
            later = _causal_attention_backward(*passed, grad_output, *second, _take(output, queries), lse)
            grads = [
                _put(grad, idx, _take(grad, idx) + grad_of_later)
                for grad, idx, grad_of_later in zip(grads, (queries, keys, keys), later)
            ]
        return *(_move_back(grad, layout, query.shape[2]) for grad in grads), None, None


def _causal_attention(
    kernel: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, ...]:
    """Output, log-sum-exp of shape `(batch_size, num_heads, sequence_length)`, and two random states or nothing."""
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scaling)
    if kernel == "cudnn":
        # No bias, with log-sum-exp, without dropout, causal, without the mask for debugging.
        options = (None, True, 0.0, True, False)
        results = aten._scaled_dot_product_cudnn_attention(query, key, value, *options, scale=scaling)
    else:
        results = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scaling)
    output, lse, _, _, _, _, seed, offset, _ = results
    return output, lse.reshape(query.shape[:3]), seed, offset


def _causal_attention_backward(
    kernel: str,
    scaling: float,
    rng_states: list[torch.Tensor],
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, where output and log-sum-exp may be those of more keys than these."""
    states = (grad_output, query, key, value, output)
    lse, lengths = lse.contiguous(), (query.shape[2], key.shape[2])
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*states, lse, 0.0, True, scale=scaling)
    if kernel == "cudnn":
        # What torch plans for shapes and for the layouts of the other three reads later outputs and their gradients in
        # the layout of the first ones (torch 2.11). So theirs is always the same.
        states = _tokens_first(grad_output), query, key, value, _tokens_first(output)
        options = (*rng_states, None, None, None, *lengths, 0.0, True)
        return aten._scaled_dot_product_cudnn_attention_backward(*states, lse[..., None], *options, scale=scaling)
    options = (None, None, *lengths, 0.0, True, *rng_states)
    return aten._scaled_dot_product_flash_attention_backward(*states, lse, *options, scale=scaling)


def _can_decode_without_plan(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """
    Whether there is a kernel for a decoding step that needs no plan. cuDNN, which `sdpa` prefers on Hopper, plans for
    every length of the cache that is new to the process, for twice as long as the step takes (torch 2.11).
    """
    if query.shape[2] != 1 or not query.is_cuda or query.shape[3] % 8 != 0 or torch.compiler.is_compiling():
        return False
    is_grouped = query.shape[1] != key.shape[1]
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, is_grouped))


def _can_group_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor
) -> bool:
    """
    Whether there is a kernel for a mask and fewer heads of keys and values than of queries: cuDNN. For the others
    `sdpa` copies keys and values for every head of the queries. Without gradients, of which cuDNN's are not relied on.
    """
    if query.shape[2] == 1 or query.shape[1] == key.shape[1] or not query.is_cuda or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value)):
        return False
    return can_use_cudnn_attention(SDPAParams(query, key, value, attention_mask, 0.0, False, True))


def two_pass_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_layout: TokenLayout | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    An attention function of transformers: `sdpa`, except in calls whose model passes on a `token_layout`, which is for
    prompts that fill an empty cache (or none) and have no dropout; for single tokens that see all of a cache; and
    where a kernel takes a mask without copies of keys and values.
    """
    if token_layout is None and not kwargs.get("dropout"):
        if attention_mask is None and _can_decode_without_plan(query, key, value):
            output, *_ = aten._scaled_dot_product_flash_attention(query, key, value, scale=scaling)
            return output.transpose(1, 2), None
        if attention_mask is not None and _can_group_heads(query, key, value, attention_mask):
            output = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
            return output.transpose(1, 2), None
    if token_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # A static cache returns room for tokens to come.
    states = (query, *(states[:, :, : query.shape[2]] for states in (key, value)))
    if torch.is_autocast_enabled(query.device.type):
        states = (tensor.to(torch.get_autocast_dtype(query.device.type)) for tensor in states)
    return attend_in_two_passes(*states, token_layout, scaling).transpose(1, 2), None


def two_pass_mask(dtype: torch.dtype = torch.float32, **kwargs) -> torch.Tensor | None:
    """
    A mask function of transformers: the mask of `sdpa` in the form that torch would give it again in every layer.

    Args:
        dtype (`torch.dtype`): of the states.
        kwargs: those of `sdpa_mask`.

    Returns:
        `torch.Tensor` of shape `(batch_size, 1, q_length, kv_length)`: 0 = attend, or else -inf; `None` where `sdpa`
        needs none.
    """
    mask = sdpa_mask(**kwargs)
    return mask if mask is None else torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), -torch.inf)


AttentionInterface.register(IMPLEMENTATION, two_pass_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, two_pass_mask)
