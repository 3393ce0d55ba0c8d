"""Molmo2 with STTS: the tokens of a video are pruned inside the ViT, and so in the language model too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.molmo2.modeling_molmo2 import (
    Molmo2CausalLMOutputWithPast,
    Molmo2ForConditionalGeneration,
    Molmo2Model,
    Molmo2ModelOutputWithPast,
    Molmo2PreTrainedModel,
    Molmo2RMSNorm,
    Molmo2TextModel,
)
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import is_flash_attention_requested

from .configuration_molmo2_stts import Molmo2SttsConfig
from .configuration_stts import check_prune_ratio
from .modeling_molmo2_stts_vision import Molmo2SttsAdapter, Molmo2SttsVisionModel, frame_chunks
from .stts_generation import CACHE, SttsGenerationMixin, remember_cut, remembered_cut
from .stts_prompt import PromptCut, check_placeholders, cut_prompt
from .stts_selection import PrunePlan, plan_pruning
from .stts_two_pass import IMPLEMENTATION as TWO_PASS
from .stts_two_pass import TokenLayout, find_kernel, lay_out_tokens


if TYPE_CHECKING:
    # `save_pretrained` copies the files that this one imports; these two belong into the folder as well.
    from .pipeline_stts import VideoTextToTextPipeline  # noqa: F401
    from .processing_molmo2_stts import Molmo2SttsProcessor  # noqa: F401


logger = logging.get_logger(__name__)

# Shorter prompts are faster with the native mask. Forward and backward in a layer of Molmo2-4B, with the mask against
# two passes of cuDNN: 0.56 and 0.61 ms against 1.13 and 1.22 at 1,397 tokens, 1.09 and 1.60 against 0.94 and 1.60 at
# 2,773, 3.08 and 5.30 against 1.30 and 3.13 at 5,525 (H100, torch 2.11, 2026-11-24, examples/measure_speed.py).
MIN_TWO_PASS_LENGTH = 2048

# Names of the scorer in checkpoints of the reference, as they are after the renaming rules of `molmo2`.
_REFERENCE_SCORER = r"vision_tower\.transformer\.temporal_token_scorer\."
_SCORER_RENAMING = [
    WeightRenaming(
        source_patterns=_REFERENCE_SCORER + reference.replace(".", r"\."),
        target_patterns="vision_tower.scorer." + name,
    )
    for reference, name in {
        "patch_token_pooler.wq": "window_pooler.q_proj",
        "patch_token_pooler.wk": "window_pooler.k_proj",
        "patch_token_pooler.wv": "window_pooler.v_proj",
        "patch_token_pooler.wo": "window_pooler.o_proj",
        "mlp.w1": "mlp.fc1",
        "mlp.w2": "mlp.fc2",
        "mlp.w3": "mlp.fc3",
    }.items()
]
register_checkpoint_conversion_mapping(
    "molmo2_stts", get_checkpoint_conversion_mapping("molmo2") + _SCORER_RENAMING, overwrite=True
)


@dataclass
class Molmo2SttsVideoFeatures(BaseModelOutputWithPooling):
    """
    What `get_video_features` returns. `pooler_output` is a tuple with the kept features of each video, of shape
    `(num_kept, hidden_size)`, in the order of frames and of windows in a frame. The other fields of the native output
    are there only where nothing is pruned.

    keep_masks (`tuple[torch.Tensor]` of shape `(num_frames, num_windows)`, int64): 1 = kept, for each video.
    scores (`tuple[torch.Tensor]` of shape `(num_frames, num_windows)`, float32, *optional*):
        For each video; `None` where nothing is pruned.
    temporal_loss (`torch.Tensor`, *optional*): scalar without weight, in training with the learned scorer.
    num_pruned (`int`): windows removed from all videos together.
    last_windows (`torch.Tensor` of shape `(1, num_windows, num_patches, hidden_size)`, *optional*):
        What `get_next_video_features` must know of the last frame; `None` where nothing is pruned.
    """

    keep_masks: tuple[torch.Tensor, ...] | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    temporal_loss: torch.Tensor | None = None
    num_pruned: int | None = None
    last_windows: torch.Tensor | None = None


@dataclass
class Molmo2SttsModelOutputWithPast(Molmo2ModelOutputWithPast):
    """
    kept_token_idx (`torch.Tensor` of shape `(batch_size, cut_length)`, int64, *optional*):
        Where each token of the cut sequence stood in the prompt, -1 for padding; `None` where nothing was cut.
    temporal_loss (`torch.Tensor`, *optional*): scalar without weight, in training.
    """

    kept_token_idx: torch.Tensor | None = None
    temporal_loss: torch.Tensor | None = None


@dataclass
class Molmo2SttsCausalLMOutputWithPast(Molmo2CausalLMOutputWithPast):
    """
    kept_token_idx (`torch.Tensor` of shape `(batch_size, cut_length)`, int64, *optional*):
        Where each token of the cut sequence stood in the prompt, -1 for padding; `None` where nothing was cut.
    labels (`torch.Tensor` of shape `(batch_size, cut_length)`, *optional*, returned when `labels` is given):
        The labels, cut like the logits.
    temporal_loss (`torch.Tensor`, *optional*): scalar without weight, in training.
    """

    kept_token_idx: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    temporal_loss: torch.Tensor | None = None


class Molmo2SttsRMSNorm(Molmo2RMSNorm):
    """
    Differences from `Molmo2RMSNorm`: one kernel on CUDA, not eight, where weight and input have one dtype.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not hidden_states.is_cuda or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _is_for_two_passes(text_config, prompt: torch.Tensor) -> bool:
    is_long = prompt.shape[1] >= MIN_TWO_PASS_LENGTH
    return text_config._attn_implementation == TWO_PASS and prompt.device.type == "cuda" and is_long


class Molmo2SttsModel(Molmo2Model):
    """
    Differences from `Molmo2Model`:
    - videos are pruned: `get_video_features` returns the kept features, and `forward` cuts the prompt to them;
    - `attn_implementation={"text_config": "sdpa_two_pass"}` is `sdpa`, but a long prompt on CUDA in half precision
      needs no mask of its length squared;
    - the norms of the language model are `Molmo2SttsRMSNorm`;
    - `prune_ratio` overrides the configuration's for one call.
    """

    config: Molmo2SttsConfig
    _auto_class = "AutoModel"

    def __init__(self, config: Molmo2SttsConfig):
        Molmo2PreTrainedModel.__init__(self, config)
        # Once more: arguments of `from_pretrained` change a configuration after it was made.
        config.check_values()
        self.vision_tower = Molmo2SttsVisionModel(config.vision_config)
        self.multi_modal_projector = Molmo2SttsAdapter(config.adapter_config)
        # A class of its own would not get the rules by which transformers renames the weights of this one.
        self.language_model = Molmo2TextModel(config.text_config)
        for name, module in list(self.language_model.named_modules()):
            if isinstance(module, Molmo2RMSNorm):
                norm = Molmo2SttsRMSNorm(len(module.weight), module.variance_epsilon)
                self.language_model.set_submodule(name, norm)
        self.post_init()

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_token_pooling: torch.Tensor,
        video_grids: torch.Tensor,
        prune_ratio: float | list[float] | None = None,
        **kwargs,
    ) -> tuple | Molmo2SttsVideoFeatures:
        """
        Encodes videos and keeps the windows with the highest scores.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(num_frames, num_patches, patch_size * patch_size * 3)`):
                Frames of all videos, one after the other.
            video_token_pooling (`torch.Tensor` of shape `(num_windows, patches_per_window)`, int64):
                The patches of each window, into the patches of all frames.
            video_grids (`torch.Tensor` of shape `(num_videos, 3)`, int64): frames, rows and columns of windows.
            prune_ratio (`float` or `list[float]`, *optional*):
                Fraction of windows to remove, one for all videos or one for each; the configuration's by default.

        Raises:
            ValueError: if the ratio is out of range, or the inputs do not describe the same frames and windows.
        """
        ratio = self._prune_ratio(prune_ratio)
        plan = plan_pruning(video_grids.tolist(), ratio, self.config.stts_config.prune_from_frame)
        is_pruned = sum(plan.num_pruned) > 0
        _check_windows(plan, pixel_values_videos, video_token_pooling, is_pruned)
        if is_pruned:
            return self._pruned_features(pixel_values_videos, video_token_pooling, plan)
        if self.config.stts_config.vision_chunk_frames is None:
            native = super().get_video_features(pixel_values_videos, video_token_pooling, video_grids, **kwargs)
        else:
            native = {"pooler_output": self._native_features(pixel_values_videos, video_token_pooling, plan)}
        shapes = [(num_frames, plan.num_windows) for num_frames in plan.num_frames]
        keep_masks = tuple(torch.ones(shape, dtype=torch.long, device=self.device) for shape in shapes)
        return Molmo2SttsVideoFeatures(**native, keep_masks=keep_masks, num_pruned=0)

    def get_next_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_token_pooling: torch.Tensor,
        video_grids: torch.Tensor,
        prune_ratio: float | None = None,
        previous: Molmo2SttsVideoFeatures | None = None,
    ) -> Molmo2SttsVideoFeatures:
        """
        Encodes the next frames of one video that is not yet complete. Windows are kept among these frames alone, so
        that every call keeps the share that the ratio says. But for that choice, features are those of the whole
        video, whose first frame is kept whole.

        A call that removes nothing has no key bias, as an unpruned video has none. `method="random"` draws the same
        noise in every call, refilled frames are those that are alone in the bins of one call, and `prune_from_frame`
        is not used.

        Args:
            pixel_values_videos, video_token_pooling, video_grids: see `get_video_features`; of one video.
            prune_ratio (`float`, *optional*): fraction of these frames' windows to remove; the configuration's by
                default.
            previous (`Molmo2SttsVideoFeatures`, *optional*):
                What the call for the frames just before returned; without it these are the first ones.

        Returns:
            `Molmo2SttsVideoFeatures`: of these frames. `generate` takes a list of them as `video_features`.

        Raises:
            ValueError: if the ratio is out of range, or the inputs do not describe the same frames and windows of one
                video, or not windows as before.
        """
        ratio = self._prune_ratio(prune_ratio)
        (num_frames, num_rows, num_cols), *others = video_grids.tolist()
        if others:
            raise ValueError(f"`get_next_video_features` takes frames of one video, got {1 + len(others)} videos.")
        plan = plan_pruning([[num_frames, num_rows, num_cols]], ratio)
        _check_windows(plan, pixel_values_videos, video_token_pooling, is_pruned=True)
        if previous is None:
            return self._pruned_features(pixel_values_videos, video_token_pooling, plan)
        shape = (1, plan.num_windows, video_token_pooling.shape[1], self.config.vision_config.hidden_size)
        if previous.last_windows is None or previous.last_windows.shape != shape:
            given = None if previous.last_windows is None else tuple(previous.last_windows.shape)
            raise ValueError(f"`previous.last_windows` must have the shape {shape} of these frames, got {given}.")
        # The frame before is the first one of the plan, but does not count.
        plan = plan_pruning([[1 + num_frames, num_rows, num_cols]], ratio, prune_from_frame=1)
        return self._pruned_features(pixel_values_videos, video_token_pooling, plan, previous.last_windows)

    def _prune_ratio(self, given: float | list[float] | None) -> float | list[float]:
        # Once more: a configuration is changed by attributes, too.
        self.config.stts_config.check_values()
        return check_prune_ratio(self.config.stts_config.prune_ratio if given is None else given)

    def _native_features(
        self, pixel_values_videos: torch.Tensor, video_token_pooling: torch.Tensor, plan: PrunePlan
    ) -> tuple[torch.Tensor, ...]:
        """Features of unpruned videos by the native code, in chunks of frames."""
        chunk_frames, features = self.config.stts_config.vision_chunk_frames, []
        for frames, pooling in frame_chunks(pixel_values_videos, video_token_pooling, plan.num_windows, chunk_frames):
            grid = torch.tensor([[len(frames) * plan.num_rows, plan.num_cols, 0, 0]])
            features += self.get_image_features(frames, pooling, grid, return_dict=True).pooler_output
        return torch.cat(features).split(plan.num_kept)

    def _pruned_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_token_pooling: torch.Tensor,
        plan: PrunePlan,
        previous_windows: torch.Tensor | None = None,
    ) -> Molmo2SttsVideoFeatures:
        stts_config, num_layers = self.config.stts_config, self.config.vision_config.num_hidden_layers
        vision = self.vision_tower(
            pixel_values_videos,
            plan=plan,
            stts_config=stts_config,
            video_token_pooling=video_token_pooling,
            feature_layers=[layer % num_layers for layer in self.config.adapter_config.vision_feature_layer],
            previous_windows=previous_windows,
        )
        chunk_windows = plan.num_windows * (stts_config.vision_chunk_frames or len(pixel_values_videos))
        chunks = vision.window_features.split(chunk_windows)
        features = torch.cat([self.multi_modal_projector(chunk).last_hidden_state for chunk in chunks])
        num_kept = [mask.numel() - num_pruned for mask, num_pruned in zip(vision.keep_masks, plan.num_pruned)]
        return Molmo2SttsVideoFeatures(
            pooler_output=features.split(num_kept),
            keep_masks=vision.keep_masks,
            scores=vision.scores,
            temporal_loss=vision.temporal_loss,
            num_pruned=sum(plan.num_pruned),
            last_windows=vision.last_windows,
        )

    def get_video_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Where the tokens of videos stand.

        Args:
            input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*).
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Looked at where there are no ids.

        Returns:
            `torch.Tensor` of shape `(batch_size, sequence_length)`, bool.
        """
        if input_ids is not None:
            return input_ids == self.config.video_token_id
        token_id = torch.tensor(self.config.video_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token_id)).all(-1)

    def cut_inputs(
        self,
        keep_masks: tuple[torch.Tensor, ...],
        inputs: dict[str, Any],
        default_position_ids: torch.Tensor,
        num_untouched: int = 0,
    ) -> tuple[dict[str, Any], PromptCut]:
        """
        Cuts the prompts of a batch to the kept tokens of their videos.

        Args:
            keep_masks (`tuple[torch.Tensor]` of shape `(num_frames, num_windows)`): see `get_video_features`.
            inputs (`dict`): `input_ids` or `inputs_embeds`, `attention_mask` of shape `(batch_size, sequence_length)`,
                and optionally `position_ids`, `mm_token_type_ids` and `labels`. Others are ignored.
            default_position_ids (`torch.Tensor` that broadcasts to `(batch_size, sequence_length)`):
                Positions of the uncut prompt where none are given.
            num_untouched (`int`): leading columns that stay as they are (a cache already holds them).

        Returns:
            `tuple[dict, PromptCut]`: the cut inputs by name, without positions where they are to be compact.

        Raises:
            ValueError: if the prompt does not fit the videos, the positions or the attention implementation.
        """
        input_ids, inputs_embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        attention_mask, shape = (
            inputs["attention_mask"],
            (input_ids if inputs_embeds is None else inputs_embeds).shape[:2],
        )
        if attention_mask.shape != shape:
            raise ValueError(
                f"Pruning cuts the attention mask with the prompt, so it must have the prompt's shape {tuple(shape)}, "
                f"got {tuple(attention_mask.shape)}."
            )
        keep = torch.cat([mask.flatten() for mask in keep_masks]).bool()
        placeholder_mask = self.get_video_placeholder_mask(input_ids, inputs_embeds)
        cut = cut_prompt(placeholder_mask, keep, attention_mask, num_untouched)
        position_ids = self._positions(inputs.get("position_ids"), default_position_ids, cut)
        pad_token_id = getattr(self.config.get_text_config(), "pad_token_id", None) or 0
        paddings = {"input_ids": pad_token_id, "inputs_embeds": 0.0, "mm_token_type_ids": 0, "labels": -100}
        cut_inputs = {
            name: cut.take(inputs[name], padding) for name, padding in paddings.items() if inputs.get(name) is not None
        }
        cut_inputs["attention_mask"] = cut.take(attention_mask, 0)
        return cut_inputs | {"position_ids": position_ids}, cut

    def check_unpruned(
        self,
        keep_masks: tuple[torch.Tensor, ...],
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> None:
        """
        Checks that prompts fit their videos and the positions where nothing is cut.

        Args:
            keep_masks (`tuple[torch.Tensor]` of shape `(num_frames, num_windows)`): see `get_video_features`.
            input_ids, inputs_embeds: see `get_video_placeholder_mask`.

        Raises:
            ValueError: if they do not fit.
        """
        placeholder_mask = self.get_video_placeholder_mask(input_ids, inputs_embeds)
        check_placeholders(placeholder_mask, sum(mask.numel() for mask in keep_masks))
        self._check_positions(placeholder_mask.shape[1], placeholder_mask.shape[1])

    def _check_positions(self, length: int, cut_length: int) -> None:
        """Checks that the language model has a position for every token of a prompt with a video."""
        stts_config, max_length = self.config.stts_config, self.config.get_text_config().max_position_embeddings
        num_positions = length if stts_config.position_ids == "original" else cut_length
        if num_positions > max_length:
            raise ValueError(
                f"The prompt takes {num_positions} positions with `stts_config.position_ids`="
                f"{stts_config.position_ids!r}, but the language model has `max_position_embeddings`={max_length}. "
                'Sample fewer frames (`num_frames`). With `stts_config.position_ids="compact"` only kept tokens count '
                f"({cut_length} at this ratio), and a higher `prune_ratio` helps."
            )

    def _positions(self, given: torch.Tensor | None, default: torch.Tensor, cut: PromptCut) -> torch.Tensor | None:
        """Positions of the kept tokens; `None` where the native model is to count them itself."""
        self._check_positions(default.shape[-1], cut.cut_length)
        if self.config.stts_config.position_ids == "compact":
            if given is not None:
                raise ValueError('`position_ids` cannot be given with `stts_config.position_ids`="compact".')
            return None
        if is_flash_attention_requested(self.config.get_text_config()):
            raise ValueError(
                "Flash attention reads positions with gaps as several packed sequences. Use "
                '`stts_config.position_ids`="compact", or another implementation for the language model: '
                '`attn_implementation={"vision_config": "flash_attention_2"}`.'
            )
        return cut.take((default if given is None else given).expand_as(cut.attention_mask), 0)

    def prune_inputs(
        self, prune_ratio: float | list[float] | None, **inputs
    ) -> tuple[dict[str, Any], Molmo2SttsVideoFeatures | None, PromptCut | None]:
        """
        Replaces a raw video in the arguments of `forward` by its kept features and cuts the rest to them. Arguments
        without a raw video are left alone, and those that the native model refuses are left for it to refuse. The
        cache gets the name that this transformers gives it.
        """
        if prune_ratio is not None:
            check_prune_ratio(prune_ratio)
        past_key_values, cache = inputs.pop("past_key_values"), inputs.pop("cache")
        cache = inputs[CACHE] = cache if past_key_values is None else past_key_values
        prompt = inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
        beside = (inputs["pixel_values"], inputs["mm_encoder_outputs"])
        if inputs["pixel_values_videos"] is None or prompt is None or any(other is not None for other in beside):
            return inputs | {"position_ids": self._positions_after_cut(inputs)}, None, None
        names = ("pixel_values_videos", "video_token_pooling", "video_grids")
        video = self.get_video_features(*(inputs[name] for name in names), prune_ratio, return_dict=True)
        inputs = inputs | dict.fromkeys(names) | {"mm_encoder_outputs": {"video": video}}
        # A cache that was reset forgets its cut here, whatever fills it now.
        remembered_cut(cache)
        if video.num_pruned == 0:
            self.check_unpruned(video.keep_masks, inputs["input_ids"], inputs["inputs_embeds"])
            return inputs, video, None
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("A raw video cannot be given with a filled cache. Use `generate`, or drop the cache.")
        if inputs["attention_mask"] is None:
            inputs["attention_mask"] = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
        default_position_ids = torch.arange(prompt.shape[1], device=prompt.device)[None]
        cut_inputs, cut = self.cut_inputs(video.keep_masks, inputs, default_position_ids)
        return inputs | cut_inputs, video, cut

    def _positions_after_cut(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Positions that go on after an uncut prompt, where the caller decodes with its cache and gives none."""
        is_original = self.config.stts_config.position_ids == "original"
        if inputs["position_ids"] is not None or not is_original:
            return inputs["position_ids"]
        earlier = remembered_cut(inputs[CACHE])
        if earlier is None:
            return None
        tokens = inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
        first = inputs[CACHE].get_seq_length() + earlier.num_removed
        return torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]

    def _token_layout(self, inputs: dict[str, Any]) -> TokenLayout | None:
        """How the prompt is attended to in two passes; `None` where the native model is to make its mask."""
        config, token_types = self.config.text_config, inputs["mm_token_type_ids"]
        prompt = inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
        shape, attention_mask = prompt.shape[:2], inputs["attention_mask"]
        if token_types is None or not _is_for_two_passes(config, prompt):
            return None
        fits = token_types.shape == shape and (attention_mask is None or attention_mask.shape == shape)
        # Without mask and cache, positions with gaps mean several packed sequences.
        is_packed = attention_mask is None and inputs["position_ids"] is not None and inputs[CACHE] is None
        has_dropout = self.training and config.attention_dropout > 0
        if not fits or is_packed or has_dropout or not self._is_prefill(inputs):
            return None
        kernel = find_kernel(
            prompt.device, self.dtype, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        if kernel is None:
            logger.warning_once(
                f"torch {torch.__version__} has no kernel for {TWO_PASS} in {self.dtype} with heads of "
                f"{config.head_dim} on this device. Masks of the prompt's length squared are used."
            )
            return None
        return lay_out_tokens(kernel, token_types.to(prompt.device) == 1, attention_mask)

    @staticmethod
    def _is_prefill(inputs: dict[str, Any]) -> bool:
        """Whether the tokens fill an empty cache or none, and so natively that images and frames see each other."""
        cache = inputs[CACHE]
        if cache is None or not cache.is_initialized:
            return True
        raw = (inputs["pixel_values"], inputs["pixel_values_videos"])
        has_features = bool(inputs["mm_encoder_outputs"]) or any(pixels is not None for pixels in raw)
        return has_features and int(cache.get_seq_length()) == 0

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_token_pooling: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        image_num_crops: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_token_pooling: torch.Tensor | None = None,
        video_grids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        prune_ratio: float | list[float] | None = None,
        **kwargs,
    ) -> tuple | Molmo2SttsModelOutputWithPast:
        """
        As the native model, on a prompt that is cut to the kept tokens.

        Args:
            prune_ratio (`float` or `list[float]`, *optional*):
                Fraction of windows to remove, one for all videos or one for each; the configuration's by default.
            cache (`Cache`, *optional*): `past_key_values`, by its name in transformers 5.24 and later.

        Raises:
            ValueError: if the ratio is out of range, or the prompt does not fit its videos or the positions.
        """
        inputs, video, cut = self.prune_inputs(
            prune_ratio,
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_token_pooling=image_token_pooling,
            image_grids=image_grids,
            image_num_crops=image_num_crops,
            pixel_values_videos=pixel_values_videos,
            video_token_pooling=video_token_pooling,
            video_grids=video_grids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            mm_token_type_ids=mm_token_type_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
        )
        layout = self._token_layout(inputs)
        if layout is not None:
            # A mask of four dimensions is passed on as it is, where another would be made into a dense one.
            inputs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
            kwargs["token_layout"] = layout
        outputs = super().forward(**inputs, use_cache=use_cache, return_dict=True, **kwargs)
        remember_cut(outputs.get(CACHE), cut)
        return Molmo2SttsModelOutputWithPast(
            **outputs,
            kept_token_idx=None if cut is None else cut.kept_token_idx,
            temporal_loss=None if video is None else video.temporal_loss,
        )


def _check_windows(
    plan: PrunePlan, pixel_values_videos: torch.Tensor, video_token_pooling: torch.Tensor, is_pruned: bool
) -> None:
    num_frames, num_patches = pixel_values_videos.shape[:2]
    num_windows, patches_per_window = video_token_pooling.shape
    if num_frames != sum(plan.num_frames) or num_windows != num_frames * plan.num_windows:
        raise ValueError(
            f"`video_grids` describes {sum(plan.num_frames)} frames of {plan.num_windows} windows, but "
            f"`pixel_values_videos` has {num_frames} frames and `video_token_pooling` {num_windows} windows."
        )
    if is_pruned and plan.num_windows * patches_per_window != num_patches:
        raise ValueError(
            f"Pruning needs windows that cover a frame exactly, but {plan.num_windows} windows of "
            f"{patches_per_window} patches are not {num_patches} patches. Use a frame size that is a multiple of the "
            "window size, or `prune_ratio=0`."
        )


class Molmo2SttsForConditionalGeneration(SttsGenerationMixin, Molmo2ForConditionalGeneration):
    """
    Differences from `Molmo2ForConditionalGeneration`:
    - videos are pruned, in `forward` and in `generate` (`SttsGenerationMixin`); `prune_ratio` overrides the
      configuration's for one call;
    - in training the temporal loss is added to the loss;
    - `load_state_dict` takes the names of saved checkpoints too.
    """

    config: Molmo2SttsConfig
    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: Molmo2SttsConfig):
        Molmo2PreTrainedModel.__init__(self, config)
        self.model = Molmo2SttsModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.vocab_size = config.text_config.vocab_size
        self.post_init()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """
        As natively, and also weights by the names that `save_pretrained` writes, which are those of released
        checkpoints: when `Trainer` goes on from a checkpoint, it hands over what it reads in the file.
        """
        if not state_dict.keys() <= self.state_dict().keys():
            state_dict = self._rename_saved(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _rename_saved(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        # float32 holds the values of every dtype that is trained, and they are copied into weights of their own dtype.
        saved, report = type(self).from_pretrained(
            None, config=self.config, state_dict=dict(state_dict), dtype=torch.float32, output_loading_info=True
        )
        renamed = {name: weight for name, weight in saved.state_dict().items() if name not in report["missing_keys"]}
        return renamed | dict.fromkeys(report["unexpected_keys"])

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_token_pooling: torch.Tensor,
        video_grids: torch.Tensor,
        prune_ratio: float | list[float] | None = None,
        **kwargs,
    ) -> tuple | Molmo2SttsVideoFeatures:
        """See `Molmo2SttsModel.get_video_features`."""
        return self.model.get_video_features(
            pixel_values_videos, video_token_pooling, video_grids, prune_ratio, **kwargs
        )

    def get_next_video_features(self, *args, **kwargs) -> Molmo2SttsVideoFeatures:
        """See `Molmo2SttsModel.get_next_video_features`."""
        return self.model.get_next_video_features(*args, **kwargs)

    def get_video_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Molmo2SttsModel.get_video_placeholder_mask`."""
        return self.model.get_video_placeholder_mask(input_ids, inputs_embeds)

    def check_unpruned(self, *args, **kwargs) -> None:
        """See `Molmo2SttsModel.check_unpruned`."""
        self.model.check_unpruned(*args, **kwargs)

    def cut_inputs(self, *args, **kwargs) -> tuple[dict[str, Any], PromptCut]:
        """See `Molmo2SttsModel.cut_inputs`."""
        return self.model.cut_inputs(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_token_pooling: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        image_num_crops: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_token_pooling: torch.Tensor | None = None,
        video_grids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        prune_ratio: float | list[float] | None = None,
        **kwargs,
    ) -> tuple | Molmo2SttsCausalLMOutputWithPast:
        """
        As the native model, on a prompt that is cut to the kept tokens: `logits`, `logits_to_keep` and the returned
        `labels` are in terms of the cut sequence, and `kept_token_idx` leads back to the prompt.

        Args:
            prune_ratio (`float` or `list[float]`, *optional*):
                Fraction of windows to remove, one for all videos or one for each; the configuration's by default.
            cache (`Cache`, *optional*): `past_key_values`, by its name in transformers 5.24 and later.

        Raises:
            ValueError: if the ratio is out of range, or the prompt does not fit its videos or the positions.
        """
        inputs, video, cut = self.model.prune_inputs(
            prune_ratio,
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_token_pooling=image_token_pooling,
            image_grids=image_grids,
            image_num_crops=image_num_crops,
            pixel_values_videos=pixel_values_videos,
            video_token_pooling=video_token_pooling,
            video_grids=video_grids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            mm_token_type_ids=mm_token_type_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            mm_encoder_outputs=mm_encoder_outputs,
        )
        outputs = super().forward(
            **inputs, use_cache=use_cache, logits_to_keep=logits_to_keep, return_dict=True, **kwargs
        )
        remember_cut(outputs.get(CACHE), cut)
        outputs = Molmo2SttsCausalLMOutputWithPast(
            **outputs,
            kept_token_idx=None if cut is None else cut.kept_token_idx,
            labels=inputs["labels"],
            temporal_loss=None if video is None else video.temporal_loss,
        )
        self._add_temporal_loss(outputs)
        return outputs

    def _add_temporal_loss(self, outputs: Molmo2SttsCausalLMOutputWithPast) -> None:
        if self.training and outputs.temporal_loss is None:
            outputs.temporal_loss = self.model.vision_tower.idle_scorer_loss()
        if outputs.loss is not None and outputs.temporal_loss is not None:
            weight = self.config.stts_config.temporal_loss_weight
            outputs.loss = outputs.loss + weight * outputs.temporal_loss.to(outputs.loss)

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, use_cache=True, is_first_iteration=False, **kwargs
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if model_inputs.get("attention_mask") is None and model_inputs.get(CACHE) is None:
            # Without mask and cache, transformers reads positions with gaps as several packed sequences.
            tokens = inputs_embeds if model_inputs.get("input_ids") is None else model_inputs["input_ids"]
            model_inputs["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        return model_inputs

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, is_first_iteration=False, **kwargs):
        if is_first_iteration and _is_for_two_passes(config.get_text_config(), inputs_embeds):
            # `forward` finds out whether it needs a mask.
            return attention_mask
        return Molmo2ForConditionalGeneration.create_masks_for_generate(
            config, inputs_embeds, attention_mask, is_first_iteration=is_first_iteration, **kwargs
        )


__all__ = ["Molmo2SttsForConditionalGeneration", "Molmo2SttsModel"]
