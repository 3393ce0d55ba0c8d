"""What is measured: prefill, training step, decoding, and the language model's attention alone.

Candidates run in turns on the same inputs, so that what changes on the machine meets all of them. A candidate that
fails, or runs out of memory, gets a row that says so.
"""

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import modeling_stts.modeling_molmo2_stts_vision as vision_tower
import modeling_stts.stts_packing as stts_packing
from modeling_stts.stts_two_pass import attend_in_two_passes, lay_out_tokens

from .flops import attention, causal_pairs, prefill_flops
from .shapes import make_inputs, num_text_tokens
from .timing import Clock, Stopwatch, medians


class Candidate(NamedTuple):
    """
    A way to run the model.

    name (`str`): "native" or "stts".
    model (`PreTrainedModel`): shares its weights with the other candidates' models.
    prune_ratio (`float`): fraction of windows to remove; 0 for the native model.
    is_compiled (`bool`): whether `torch.compile` is on, for the ViT and the language model.
    """

    name: str
    model: PreTrainedModel
    prune_ratio: float = 0.0
    is_compiled: bool = False

    @property
    def kwargs(self) -> dict[str, float]:
        """What makes a call of the model this candidate."""
        return {} if self.name == "native" else {"prune_ratio": self.prune_ratio}

    @property
    def row(self) -> dict[str, Any]:
        """The columns that say which candidate a row is about."""
        return {"candidate": self.name, "prune_ratio": self.prune_ratio, "is_compiled": self.is_compiled}

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """Runs calls of the model compiled, if the candidate is to be."""
        parts = (self.model.model.vision_tower, self.model.model.language_model) if self.is_compiled else ()
        for part in parts:
            # What `part.compile()` sets, here once for all calls.
            part._compiled_call_impl = _compile(part)
        try:
            yield
        finally:
            for part in parts:
                part._compiled_call_impl = None


@functools.cache
def _compile(part: torch.nn.Module) -> Callable:
    return torch.compile(part._call_impl)


class Runs(NamedTuple):
    """
    How often candidates run.

    warm_up (`int`): runs before those that count.
    most (`int`), least (`int`): runs that count; fewer than `most` once `seconds` are over.
    seconds (`float`): see `most`.
    """

    warm_up: int = 2
    most: int = 7
    least: int = 3
    seconds: float = 12.0


def run_in_turns(
    candidates: list[Candidate], run: Callable[[Candidate], dict[str, float]], device: torch.device, runs: Runs
) -> list[dict[str, Any]]:
    """
    Runs candidates in turns.

    Args:
        candidates (`list[Candidate]`).
        run (`Callable`): measures a candidate once and returns numbers by name.
        device (`torch.device`), runs (`Runs`).

    Returns:
        `list[dict]`: for each candidate medians of its numbers, `peak_bytes` (on CUDA) and `num_runs`, or `error`.
    """
    # cuDNN needs memory that torch does not hold.
    _free(device)
    results, errors, peaks, start = [[] for _ in candidates], {}, {}, time.monotonic()
    for round_idx in range(runs.warm_up + runs.most):
        if round_idx >= runs.warm_up + runs.least and time.monotonic() - start > runs.seconds:
            break
        for idx, candidate in enumerate(candidates):
            if idx in errors:
                continue
            try:
                numbers, peaks[idx] = _run_once(run, candidate, device)
            except RuntimeError as error:
                errors[idx] = _describe(error)
                _free(device)
                continue
            if round_idx >= runs.warm_up:
                results[idx].append(numbers)
    return [
        candidate.row | errors.get(idx, {})
        if idx in errors
        else candidate.row | medians(results[idx]) | {"peak_bytes": peaks[idx], "num_runs": len(results[idx])}
        for idx, candidate in enumerate(candidates)
    ]


def _run_once(run, candidate, device):
    if device.type != "cuda":
        return run(candidate), None
    torch.cuda.reset_peak_memory_stats()
    return run(candidate), torch.cuda.max_memory_allocated()


def _describe(error: RuntimeError) -> dict[str, str]:
    is_memory = isinstance(error, torch.OutOfMemoryError)
    return {"error": "out of memory" if is_memory else f"{type(error).__name__}: {error}"[:200]}


def _free(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_prefill(
    candidates: list[Candidate], num_frames: int, batch_size: int, device: torch.device, runs: Runs
) -> list[dict[str, Any]]:
    """
    Prefills a cache with prompts of one video each.

    Returns:
        `list[dict]`: for each candidate the milliseconds of its parts (`vit_ms` with the adapter, `scoring_ms` of
        scorer, selection and packing, `llm_ms`, `total_ms`), `cache_bytes`, `flops`, and `launch_ms` in which the host
        has launched the layers of the language model: where short prompts have it near `llm_ms`, the device waits for
        the host. Behind a long one the device's queue is full, and the host waits.
    """
    config = candidates[-1].model.config
    inputs = make_inputs(config, num_frames, batch_size, device)
    rows = run_in_turns(candidates, lambda candidate: _prefill_once(candidate, inputs, device), device, runs)
    text = num_text_tokens(num_frames)
    for row in rows:
        parts = prefill_flops(config, num_frames, text, row["prune_ratio"])
        row["flops"] = {part: batch_size * flops for part, flops in parts.items()}
    return [{"kind": "prefill", "num_frames": num_frames, "batch_size": batch_size} | row for row in rows]


def measure_compiled_prefill(*args) -> list[dict[str, Any]]:
    """As `measure_prefill`, in rows of another kind: they are compared with one another alone."""
    return [row | {"kind": "compiled prefill"} for row in measure_prefill(*args)]


def _prefill_once(candidate: Candidate, inputs: dict[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    watch, host, base = Stopwatch(device), Stopwatch(torch.device("cpu")), candidate.model.model
    functions = [(base, "get_video_features", "vision_ms")]
    if candidate.name != "native" and not candidate.is_compiled:
        scoring = [(base.vision_tower, "score_windows"), (base.vision_tower, "key_bias")]
        scoring += [(vision_tower, "select_windows"), (stts_packing, "pack_chunk")]
        functions += [(owner, attribute, "scoring_ms") for owner, attribute in scoring]
    on_host = [] if candidate.is_compiled else [(base.language_model, "forward", "launch_ms")]
    with torch.no_grad(), candidate.compiled(), watch.on(*functions), host.on(*on_host):
        forward = watch.wrap(candidate.model, "total_ms")
        outputs = forward(**inputs, logits_to_keep=1, **candidate.kwargs)
    times = watch.read()
    vision, scoring = times["vision_ms"], times.get("scoring_ms", 0.0)
    layers = outputs.past_key_values.layers
    return {
        "vit_ms": vision - scoring,
        "scoring_ms": scoring,
        "llm_ms": times["total_ms"] - vision,
        "total_ms": times["total_ms"],
        **host.read(),
        "cache_bytes": sum(states.nbytes for layer in layers for states in (layer.keys, layer.values)),
    }


def measure_training(
    candidates: list[Candidate], num_frames: int, batch_size: int, device: torch.device, runs: Runs
) -> list[dict[str, Any]]:
    """
    Forward and backward with gradient checkpointing, and with the temporal loss where windows are pruned. All text is
    predicted. No optimizer.

    Returns:
        `list[dict]`: for each candidate `total_ms`, and `flops`, of which recomputation is no part.
    """
    config = candidates[-1].model.config
    inputs = make_inputs(config, num_frames, batch_size, device)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] == 1, -100)
    inputs["labels"][inputs["labels"] >= config.text_config.vocab_size] = -100
    rows = run_in_turns(candidates, lambda candidate: _train_once(candidate, inputs, device), device, runs)
    text = num_text_tokens(num_frames)
    for row in rows:
        parts = prefill_flops(config, num_frames, text, row["prune_ratio"])
        row["flops"] = {part: 3 * batch_size * flops for part, flops in parts.items()}
    return [{"kind": "training", "num_frames": num_frames, "batch_size": batch_size} | row for row in rows]


def _train_once(candidate: Candidate, inputs: dict[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    watch, model = Stopwatch(device), candidate.model
    model.train()
    model.gradient_checkpointing_enable()
    try:
        watch.wrap(lambda: model(**inputs, **candidate.kwargs).loss.backward(), "total_ms")()
        return watch.read()
    finally:
        model.zero_grad(set_to_none=True)
        model.gradient_checkpointing_disable()
        model.eval()


class _StepClock(StoppingCriteria):
    """Notes when each token is there; stops nothing."""

    def __init__(self, clock: Clock):
        self.clock, self.points = clock, []

    def __call__(self, input_ids, scores, **kwargs):
        self.points.append(self.clock.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def measure_decoding(
    candidates: list[Candidate], num_frames: int, num_tokens: int, device: torch.device, runs: Runs
) -> list[dict[str, Any]]:
    """
    Greedy decoding by `generate` after a prompt with one video, with a dynamic cache. Compiled candidates have a
    static one, with which `generate` compiles the decoding by itself.

    Kernels may need a plan for each length of the cache, once in a process. So no candidate meets lengths of another:
    each has a longer question than the one before, by as many tokens as are decoded.

    Returns:
        `list[dict]`: for each candidate `tokens_per_second`, from the median of the second half of the steps, and
        `tokens_per_second_at_first`, the same in the first round, where every length of the cache is new.
    """
    inputs = make_inputs(candidates[-1].model.config, num_frames, 1, device)
    longer = {candidate: _ask_more(inputs, idx * num_tokens) for idx, candidate in enumerate(candidates)}

    def run(candidate):
        return _decode_once(candidate, longer[candidate], num_tokens, device)

    first = run_in_turns(candidates, run, device, Runs(warm_up=0, most=1, least=1))
    rows = run_in_turns(candidates, run, device, runs)
    for row, first_row in zip(rows, first):
        row["tokens_per_second_at_first"] = first_row.get("tokens_per_second")
    return [{"kind": "decoding", "num_frames": num_frames, "batch_size": 1} | row for row in rows]


def _ask_more(inputs: dict[str, torch.Tensor], num_tokens: int) -> dict[str, torch.Tensor]:
    """The same prompts, whose question goes on with its last token."""
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    return inputs | {
        name: torch.cat([inputs[name], inputs[name][:, -1:].expand(-1, num_tokens)], dim=1) for name in names
    }


def _decode_once(candidate, inputs, num_tokens, device):
    steps, cache = _StepClock(Clock(device)), "dynamic"
    if candidate.is_compiled:
        cache = "static"
        # Without kernels for several lengths of the cache, which are slower than those for one.
        torch.compiler.reset()
    lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
    criteria, options = StoppingCriteriaList([steps]), {"do_sample": False, "cache_implementation": cache}
    candidate.model.generate(**inputs, **lengths, **options, stopping_criteria=criteria, **candidate.kwargs)
    steps.clock.wait()
    points = steps.points[num_tokens // 2 :]
    step_ms = statistics.median(map(steps.clock.milliseconds, points[:-1], points[1:]))
    return {"tokens_per_second": 1000 / step_ms}


def measure_attention(text_config, num_frames: int, kernels: list[str], device: torch.device) -> list[dict[str, Any]]:
    """
    The attention of one layer of the language model to a prompt with an unpruned video: `sdpa` with the native mask,
    and two passes of each kernel.

    Args:
        text_config (`Molmo2TextConfig`): shapes.
        num_frames (`int`): frames of the video.
        kernels (`list[str]`): see `stts_two_pass.find_kernel`.
        device (`torch.device`): computes in bfloat16 on CUDA.

    Returns:
        `list[dict]`: for each way `first_ms` (forward, with what is planned for a new length), `next_ms` (the same
        with one token more, which two passes round to the same length), `forward_ms`, `backward_ms`, `flops` of the
        forward, and the relative `difference` from `sdpa` and `gradient_difference`.
    """
    prompt, next_prompt = (_attention_prompt(text_config, num_frames, num_text, device) for num_text in (20, 21))
    length, heads = prompt[0].shape[1], text_config.num_attention_heads
    flops = attention(causal_pairs(length, 81 * num_frames), heads * text_config.head_dim)
    rows, reference, watch = [], None, Stopwatch(device)
    for kernel in (None, *kernels):
        name = "sdpa" if kernel is None else f"two passes, {kernel}"
        row = {"kind": "attention", "num_frames": num_frames, "num_tokens": length, "way": name, "flops": flops}
        try:
            numbers, results = _time_way(_way_of_attention(kernel, *prompt), prompt[1], device)
            watch.wrap(_way_of_attention(kernel, *next_prompt), "next_ms")()
            numbers |= watch.read()
        except RuntimeError as error:
            rows.append(row | _describe(error))
            continue
        reference = results if reference is None else reference
        errors = [_relative_error(mine, other) for mine, other in zip(results, reference)]
        rows.append(row | numbers | {"difference": errors[0], "gradient_difference": max(errors[1:])})
    return rows


def _attention_prompt(text_config, num_frames, num_text, device):
    """Which tokens are vision tokens, and random query, key and value."""
    frame = [False] * 4 + [True] * 81 + [False]
    is_vision = torch.tensor([[False, *frame * num_frames, *[False] * num_text]], device=device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = (text_config.num_attention_heads, *[text_config.num_key_value_heads] * 2)
    shapes = [(1, is_vision.shape[1], n, text_config.head_dim) for n in heads]
    states = [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for shape in shapes]
    return is_vision, [tensor.requires_grad_() for tensor in states]


def _way_of_attention(kernel, is_vision, states) -> Callable[[], torch.Tensor]:
    """`sdpa` where no kernel is given."""
    scaling = states[0].shape[-1] ** -0.5
    if kernel is not None:
        layout = lay_out_tokens(kernel, is_vision)
        return lambda: attend_in_two_passes(*states, layout, scaling).transpose(1, 2)
    module, length = torch.nn.Module(), is_vision.shape[1]
    module.num_key_value_groups = states[0].shape[1] // states[1].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=is_vision.device).tril()
    mask = (causal | (is_vision & is_vision.mT))[None, None]
    return lambda: sdpa_attention_forward(module, *states, mask, scaling=scaling)[0]


def _time_way(way, states, device):
    clock, runs = Clock(device), []
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(8):
        points = [clock.now()]
        output = way()
        points.append(clock.now())
        weight = torch.randn(output.shape, generator=generator, device=device, dtype=output.dtype)
        points.append(clock.now())
        gradients = torch.autograd.grad(output, states, weight)
        points.append(clock.now())
        clock.wait()
        runs.append([clock.milliseconds(start, end) for start, end in zip(points, points[1:])])
        generator.manual_seed(0)
    forward, _, backward = (statistics.median(column) for column in zip(*runs[3:]))
    return {"first_ms": runs[0][0], "forward_ms": forward, "backward_ms": backward}, (output.detach(), *gradients)


def _relative_error(ours, reference):
    return ((ours.float() - reference.float()).norm() / reference.float().norm()).item()
