"""`generate` on a cut prompt, while everything that the caller sees or passes stays in terms of the uncut one."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .configuration_stts import check_prune_ratio
from .stts_prompt import PromptCut
from .stts_release import TRANSFORMERS


# What transformers calls the cache among a model's inputs and outputs.
CACHE = "cache" if TRANSFORMERS >= (5, 24) else "past_key_values"


class UncutPrompt(NamedTuple):
    """
    A prompt as the caller gave it.

    input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`).
    cut_length (`int`): its length after the cut.
    """

    input_ids: torch.Tensor
    cut_length: int

    def restore(self, sequences: torch.Tensor) -> torch.Tensor:
        """
        Puts the uncut prompt in front of new tokens.

        Args:
            sequences (`torch.Tensor` of shape `(batch_size * n, cut_length + num_new)`): `n` rows for each prompt.

        Returns:
            `torch.Tensor` of shape `(batch_size * n, sequence_length + num_new)`.
        """
        rows_per_prompt = sequences.shape[0] // self.input_ids.shape[0]
        prompt = self.input_ids.to(sequences.device).repeat_interleave(rows_per_prompt, dim=0)
        return torch.cat([prompt, sequences[:, self.cut_length :]], dim=1)


class UncutLogitsProcessor(LogitsProcessor):
    """Shows the uncut prompt to a caller's logits processor."""

    def __init__(self, wrapped: LogitsProcessor, prompt: UncutPrompt):
        self.wrapped = wrapped
        self.prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.wrapped(self.prompt.restore(input_ids), scores)


class UncutStoppingCriteria(StoppingCriteria):
    """Shows the uncut prompt to a caller's stopping criterion."""

    def __init__(self, wrapped: StoppingCriteria, prompt: UncutPrompt):
        self.wrapped = wrapped
        self.prompt = prompt

    def __getattr__(self, name: str) -> Any:
        # `generate` looks for `eos_token_id` on the criteria it is given. A copy under construction has nothing yet.
        if name == "wrapped":
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.wrapped(self.prompt.restore(input_ids), scores, **kwargs)


class UncutStreamer(BaseStreamer):
    """Gives the uncut prompt to a caller's streamer, which gets the prompt first and then the new tokens."""

    def __init__(self, streamer: BaseStreamer, prompt: UncutPrompt):
        self.streamer = streamer
        self.prompt = prompt
        self.prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(self.prompt.restore(value) if self.prompt_is_next else value)
        self.prompt_is_next = False

    def end(self) -> None:
        self.streamer.end()


def join_video_features(outputs: list[ModelOutput]) -> ModelOutput:
    """
    Puts the videos of several outputs of `get_video_features` into one.

    Args:
        outputs (`list[ModelOutput]`): at least one, with `pooler_output`, `keep_masks` and `num_pruned`.

    Returns:
        `ModelOutput`: a new one, because generation with beams writes into it.

    Raises:
        ValueError: if it is not a list, or empty.
    """
    if not isinstance(outputs, (list, tuple)) or not outputs:
        raise ValueError(f"`video_features` must be a list of at least one output, got {type(outputs).__name__}.")
    names = ("pooler_output", "keep_masks")
    joined = {name: tuple(value for output in outputs for value in output[name]) for name in names}
    return type(outputs[0])(**joined, num_pruned=sum(output.num_pruned for output in outputs))


def remember_cut(cache: Cache | None, cut: PromptCut | None) -> None:
    """Keeps the cut of a prompt, if it was cut, with the cache that it filled, if there is one."""
    if cache is not None and cut is not None:
        cache.stts_cut = cut


def remembered_cut(cache: Cache | None) -> PromptCut | None:
    """
    The cut of the prompt that a cache holds, if any. A cache that was reset, or cropped to what stood before the cut,
    forgets it.

    Raises:
        ValueError: if the cache was cropped within the cut prompt.
    """
    # The attribute first: the length of a static cache is a tensor, which compiled decoding must not look at.
    cut = getattr(cache, "stts_cut", None)
    if cut is None or (length := int(cache.get_seq_length())) >= cut.cut_length:
        return cut
    if not torch.equal(cut.kept_token_idx[:, :length].cpu(), torch.arange(length).expand(len(cut.kept_token_idx), -1)):
        raise ValueError(
            f"The cache was cropped to {length} tokens, within a pruned prompt of {cut.cut_length}. Crop it to what "
            "stands before the video, or reset it."
        )
    cache.stts_cut = None
    return None


class SttsGenerationMixin(GenerationMixin):
    """
    Generation on pruned prompts. Differences from `GenerationMixin`:
    - raw videos are encoded once, before the loop, and the prompt is cut to the kept tokens;
    - returned sequences begin with the uncut prompt, and so do those that the caller's logits processors, stopping
      criteria and streamers see; `max_length` and `min_length` count the uncut prompt;
    - the cache remembers the cut, so that a second turn can be given the full conversation.

    A model supplies `get_video_features`, whose output has `keep_masks`, `get_video_placeholder_mask`,
    `check_unpruned` and `cut_inputs`.
    """

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: list[LogitsProcessor] | None = None,
        stopping_criteria: list[StoppingCriteria] | None = None,
        prefix_allowed_tokens_fn: Callable | None = None,
        synced_gpus: bool | None = None,
        assistant_model=None,
        streamer: BaseStreamer | None = None,
        *,
        prune_ratio: float | list[float] | None = None,
        video_features: list[ModelOutput] | None = None,
        **kwargs,
    ):
        """
        As `GenerationMixin.generate`, with more arguments.

        Args:
            prune_ratio (`float` or `list[float]`, *optional*):
                Fraction of each video's windows to remove in this call, one for all videos or one for each; the
                configuration's by default.
            video_features (`list[ModelOutput]`, *optional*):
                In place of raw videos, what `get_video_features` or `get_next_video_features` returned for all of
                them, in order. The prompt is the uncut one.

        Raises:
            ValueError: if the ratio is out of range, the prompt does not fit its videos or the model's positions, or
                a video is given to continuous batching, beside a cache that already holds one, or both raw and
                encoded.
        """
        if prune_ratio is not None:
            check_prune_ratio(prune_ratio)
        if video_features is not None:
            kwargs["video_features"] = video_features
        if kwargs.get("past_key_values") is not None:
            kwargs[CACHE] = kwargs.pop("past_key_values")
        settings = _Settings(generation_config, self.generation_config, kwargs)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        uncut, cut = self._cut_for_generation(settings, prune_ratio, kwargs)
        if uncut is not None:
            logits_processor = [UncutLogitsProcessor(processor, uncut) for processor in logits_processor or ()]
            stopping_criteria = [UncutStoppingCriteria(criterion, uncut) for criterion in stopping_criteria or ()]
            streamer = None if streamer is None else UncutStreamer(streamer, uncut)
            prefix_allowed_tokens_fn = _show_uncut_prefix(prefix_allowed_tokens_fn, uncut, settings)
        outputs = super().generate(
            generation_config=generation_config,
            logits_processor=None if logits_processor is None else LogitsProcessorList(logits_processor),
            stopping_criteria=None if stopping_criteria is None else StoppingCriteriaList(stopping_criteria),
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            synced_gpus=synced_gpus,
            assistant_model=assistant_model,
            streamer=streamer,
            **kwargs,
        )
        remember_cut(getattr(outputs, CACHE, kwargs.get(CACHE)), cut)
        return outputs if uncut is None else _restore_prompt(outputs, uncut)

    def _cut_for_generation(
        self, settings: "_Settings", prune_ratio: float | list[float] | None, kwargs: dict[str, Any]
    ) -> tuple[UncutPrompt | None, PromptCut | None]:
        """Encodes and cuts in place; returns the prompt to restore and the cut to remember, where there are any."""
        earlier = remembered_cut(kwargs.get(CACHE))
        if earlier is not None:
            return self._cut_next_turn(earlier, settings, kwargs), None
        if kwargs.get("pixel_values_videos") is None and "video_features" not in kwargs:
            return None, None
        if "video_features" in kwargs and (prune_ratio is not None or kwargs.get("pixel_values_videos") is not None):
            raise ValueError("`video_features` cannot be passed with `pixel_values_videos` or `prune_ratio`.")
        if settings["cache_implementation"] == "paged":
            raise ValueError('`cache_implementation="paged"` (continuous batching) ignores videos; use another cache.')
        if kwargs.get("mm_encoder_outputs") or kwargs.get("pixel_values") is not None:
            raise ValueError(
                "One call takes videos, images (`pixel_values`) or `mm_encoder_outputs`, got videos and another."
            )
        return self._cut_first_turn(settings, prune_ratio, kwargs)

    def _cut_first_turn(
        self, settings: "_Settings", prune_ratio: float | list[float] | None, kwargs: dict[str, Any]
    ) -> tuple[UncutPrompt | None, PromptCut | None]:
        input_ids = kwargs.get("input_ids")
        if input_ids is None and kwargs.get("inputs_embeds") is None:
            raise ValueError("A video needs its prompt: pass `input_ids` or `inputs_embeds`.")
        features, raw_videos = kwargs.pop("video_features", None), self._pop_video_inputs(kwargs)
        if features is None:
            video = self.get_video_features(**raw_videos, prune_ratio=prune_ratio)
        else:
            video = join_video_features(features)
        kwargs["mm_encoder_outputs"] = {"video": video}
        if video.num_pruned == 0:
            self.check_unpruned(video.keep_masks, input_ids, kwargs.get("inputs_embeds"))
            return None, None
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = _infer_attention_mask(input_ids, kwargs.get("inputs_embeds"), settings)
        attention_mask, cache = kwargs["attention_mask"], kwargs.get(CACHE)
        cut_inputs, cut = self.cut_inputs(
            video.keep_masks,
            kwargs,
            default_position_ids=_default_positions(attention_mask),
            num_untouched=0 if cache is None else cache.get_seq_length(),
        )
        kwargs.update(cut_inputs | _shifted_lengths(cut, settings))
        return None if input_ids is None else UncutPrompt(input_ids, cut.cut_length), cut

    def _cut_next_turn(self, earlier: PromptCut, settings: "_Settings", kwargs: dict[str, Any]) -> UncutPrompt | None:
        """Cuts a conversation that begins with a prompt that was cut before, or its mask if only new ids are given."""
        self._pop_video_inputs(kwargs)
        kwargs.pop("video_features", None)
        input_ids, attention_mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if input_ids is None or input_ids.shape[0] % len(earlier.kept_token_idx) != 0:
            raise ValueError(
                f"The cache holds {len(earlier.kept_token_idx)} pruned prompts. A further turn needs `input_ids` of "
                f"as many rows, or of several for each, got {None if input_ids is None else tuple(input_ids.shape)}."
            )
        length = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        num_new = length - earlier.attention_mask.shape[1]
        has_full_ids = input_ids.shape[1] == length
        new_ids = input_ids[:, -num_new:] if has_full_ids else input_ids
        if num_new <= 0 or self.get_video_placeholder_mask(new_ids).any():
            raise ValueError(
                f"The cache holds a pruned prompt of {earlier.attention_mask.shape[1]} tokens. A further turn needs "
                "the full conversation, or its new ids with the full attention mask, and no new video; got "
                f"{length} tokens."
            )
        cut = earlier.extend(input_ids.shape[0], num_new)
        if attention_mask is None:
            new_mask = _infer_attention_mask(new_ids, None, settings)
            attention_mask = torch.cat([cut.attention_mask[:, :-num_new], new_mask.to(cut.attention_mask)], dim=1)
        kwargs["attention_mask"] = cut.take(attention_mask, 0)
        if self.config.stts_config.position_ids == "original":
            position_ids = kwargs.get("position_ids")
            position_ids = _default_positions(attention_mask) if position_ids is None else position_ids
            kwargs["position_ids"] = cut.take(position_ids.expand(attention_mask.shape[0], -1), 0)
        if not has_full_ids:
            return None
        kwargs["input_ids"] = cut.take(input_ids, 0)
        if kwargs.get("mm_token_type_ids") is not None:
            kwargs["mm_token_type_ids"] = cut.take(kwargs["mm_token_type_ids"], 0)
        kwargs.update(_shifted_lengths(cut, settings))
        return UncutPrompt(input_ids, cut.cut_length)

    def _merge_criteria_processor_list(self, default_list: list, custom_list: list) -> list:
        # One of the caller's takes the place of the default of its type, which the wrappers would hide.
        given = {type(getattr(custom, "wrapped", custom)) for custom in custom_list}
        default_list = type(default_list)(default for default in default_list if type(default) not in given)
        return super()._merge_criteria_processor_list(default_list, custom_list)

    def _pop_video_inputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        names = inspect.signature(self.get_video_features).parameters
        return {name: kwargs.pop(name) for name in names if name in kwargs}


class _Settings(NamedTuple):
    """A generation setting by name: the call's, else the given configuration's, else the model's."""

    given: GenerationConfig | None
    default: GenerationConfig
    call: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        values = (self.call.get(name), getattr(self.given, name, None), getattr(self.default, name, None))
        return next((value for value in values if value is not None), None)


def _infer_attention_mask(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, settings: _Settings
) -> torch.Tensor:
    """As `generate` does without a mask: padding is where the pad token stands, unless it also ends sequences."""
    if input_ids is None:
        return torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
    pad, eos = settings["pad_token_id"], settings["eos_token_id"]
    eos = eos if isinstance(eos, (list, tuple)) else [eos]
    return torch.ones_like(input_ids) if pad is None or pad in eos else input_ids.ne(pad).long()


def _default_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """As `generate` counts: padding does not."""
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)


def _shifted_lengths(cut: PromptCut, settings: _Settings) -> dict[str, int]:
    """`max_length` and `min_length`, where set, in terms of the cut prompt; refuses one that the prompt fills."""
    prompt_length = cut.attention_mask.shape[1]
    max_length = settings["max_length"]
    if max_length is not None and settings["max_new_tokens"] is None and max_length <= prompt_length:
        raise ValueError(
            f"`max_length`={max_length} leaves no room for new tokens: the prompt has {prompt_length} tokens before "
            "pruning. Use a larger `max_length` or `max_new_tokens`."
        )
    lengths = {name: settings[name] for name in ("max_length", "min_length") if settings[name]}
    return {name: max(0, length - cut.num_removed) for name, length in lengths.items()}


def _show_uncut_prefix(
    prefix_allowed_tokens_fn: Callable | None, uncut: UncutPrompt, settings: _Settings
) -> Callable | None:
    if prefix_allowed_tokens_fn is None:
        return None
    # Beams of a prompt share its batch index; several sampled sequences of a prompt do so since transformers 5.24.
    is_shared = TRANSFORMERS >= (5, 24) or (settings["num_beams"] or 1) > 1
    per_prompt = 1 if is_shared else settings["num_return_sequences"] or 1

    def on_uncut_prefix(batch_id: int, input_ids: torch.Tensor) -> list[int]:
        prompt = uncut.input_ids[batch_id // per_prompt].to(input_ids.device)
        return prefix_allowed_tokens_fn(batch_id, torch.cat([prompt, input_ids[uncut.cut_length :]]))

    return on_uncut_prefix


def _restore_prompt(outputs, uncut: UncutPrompt):
    if isinstance(outputs, torch.Tensor):
        return uncut.restore(outputs)
    outputs.sequences = uncut.restore(outputs.sequences)
    return outputs
