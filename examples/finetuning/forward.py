"""The forward pass of a training: packed rows, mixed batches, and every trained weight taking part in every step.

It uses what the model offers: `get_video_features` and `get_image_features` encode, `cut_inputs` cuts the prompts to
the kept tokens, and the native `forward` runs the language model on the features (`mm_encoder_outputs`), with a mask
that hides the samples of a row from each other. So packing is exact: tested against each sample alone.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from modeling_stts import Molmo2SttsForConditionalGeneration
from modeling_stts.modeling_molmo2_stts import Molmo2SttsVideoFeatures
from modeling_stts.stts_two_pass import IMPLEMENTATION as TWO_PASS

from .collator import GRIDS, MEDIA_INPUTS, PIXELS, POOLING


@dataclass
class TrainingOutput(ModelOutput):
    """
    language_loss (`torch.Tensor`): sum over the labels of the batch.
    temporal_loss (`torch.Tensor`): mean over the windows that it compares, without weight; 0 where none is pruned.
    num_tokens (`torch.Tensor`): before the cut, without padding.
    num_windows, num_kept (`torch.Tensor`): windows of all videos, and those that stayed.
    score_sums (`torch.Tensor` of shape `(3,)`): number of scores of pruned videos, their sum and sum of squares.
    answers_right (`torch.Tensor` of shape `(num_answers,)`, bool): whether every token of an answer is the likeliest.
    answers_sample (`torch.Tensor` of shape `(num_answers,)`, int64): the number in `sample_idx` it belongs to.
    """

    language_loss: torch.Tensor | None = None
    temporal_loss: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    num_windows: torch.Tensor | None = None
    num_kept: torch.Tensor | None = None
    score_sums: torch.Tensor | None = None
    answers_right: torch.Tensor | None = None
    answers_sample: torch.Tensor | None = None


class Media(NamedTuple):
    """
    The images and videos of a batch, encoded.

    features (`list[torch.Tensor]` of shape `(num_kept, hidden_size)`): of each image or video, in the samples' order.
    keep_masks (`list[torch.Tensor]`): 1 = kept, for each; nothing of an image goes.
    video (`Molmo2SttsVideoFeatures`, *optional*): of all videos.
    """

    features: list[torch.Tensor]
    keep_masks: list[torch.Tensor]
    video: Molmo2SttsVideoFeatures | None

    @property
    def is_pruned(self) -> bool:
        return self.video is not None and self.video.num_pruned > 0


def replace_forward(model: Molmo2SttsForConditionalGeneration) -> None:
    """
    Makes `training_forward` the `forward` of this one object: a subclass would leave its name in saved checkpoints.
    """
    model.forward = MethodType(training_forward, model)


def training_forward(
    self: Molmo2SttsForConditionalGeneration,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    sample_idx: torch.Tensor,
    is_video: torch.Tensor,
    prune_ratio: float,
    **media_inputs,
) -> TrainingOutput:
    """
    Args:
        input_ids, labels, mm_token_type_ids, sample_idx, is_video, media_inputs: what `Collator` makes.
        prune_ratio (`float`): fraction of windows to remove.

    Raises:
        ValueError: if the batch does not fit the model, or its rows are packed and the attention takes no mask.
    """
    media = _encode_media(self, is_video, prune_ratio, media_inputs)
    num_tokens = sample_idx.ne(0).sum()
    inputs = {"input_ids": input_ids, "labels": labels, "mm_token_type_ids": mm_token_type_ids}
    inputs, labels, sample_idx = _cut(self, inputs, sample_idx, media)
    inputs = _add_features(self, inputs, media)
    hidden_states = self.model(**inputs, use_cache=False).last_hidden_state
    is_target = labels[:, 1:] != -100
    targets = labels[:, 1:][is_target]
    # Only where there is a label: the logits of a whole video prompt would be gigabytes.
    logits = self.lm_head(hidden_states[:, :-1][is_target]).float()
    return TrainingOutput(
        language_loss=F.cross_entropy(logits, targets, reduction="sum"),
        temporal_loss=_temporal_loss(media, logits),
        num_tokens=num_tokens,
        **_count_windows(media, logits.device),
        **_judge_answers(logits.argmax(-1) == targets, is_target, sample_idx),
    )


def idle_zero(model: Molmo2SttsForConditionalGeneration) -> torch.Tensor:
    """A zero in which every trained weight of the ViT, the scorer and the connector takes part."""
    modules = (model.model.vision_tower, model.model.multi_modal_projector)
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    return 0.0 * sum((weight.sum().float() for weight in weights), torch.zeros((), device=model.device))


def _add_features(
    model: Molmo2SttsForConditionalGeneration, inputs: dict[str, torch.Tensor], media: Media
) -> dict[str, Any]:
    """
    Inputs of the language model with the features, or with a zero in their place.

    Distributed training waits for the gradients of all trained weights in every step, but a batch may have no video,
    or none that is pruned. The zero stands in front of the language model, since FSDP also counts on the same order of
    gradients everywhere: with frozen embeddings, those of the first block would come last where nothing before it
    is trained.
    """
    if media.is_pruned:
        features = media.features
    else:
        zero = idle_zero(model)
        features = [tokens + zero.to(tokens.dtype) for tokens in media.features]
    if features:
        return inputs | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    return inputs | {"input_ids": None, "inputs_embeds": embeddings + zero.to(embeddings.dtype)}


def _encode_media(
    model: Molmo2SttsForConditionalGeneration, is_video: torch.Tensor, prune_ratio: float, inputs: dict[str, Any]
) -> Media:
    def encode(kind: str, function, **kwargs):
        arguments = [inputs[MEDIA_INPUTS[kind][key]] for key in (PIXELS, POOLING, GRIDS)]
        return function(*arguments, **kwargs, return_dict=True)

    kinds = ["video" if flag else "image" for flag in is_video.tolist()]
    video = image = None
    if "video" in kinds:
        video = encode("video", model.get_video_features, prune_ratio=prune_ratio)
    if "image" in kinds:
        image = encode("image", model.get_image_features)
    features = {
        "video": iter(video.pooler_output if video else ()),
        "image": iter(image.pooler_output if image else ()),
    }
    masks = iter(video.keep_masks if video else ())
    in_order = [next(features[kind]) for kind in kinds]
    keep_masks = [
        next(masks) if kind == "video" else torch.ones(len(tokens), dtype=torch.long, device=tokens.device)
        for kind, tokens in zip(kinds, in_order)
    ]
    return Media(in_order, keep_masks, video)


def _cut(
    model: Molmo2SttsForConditionalGeneration, inputs: dict[str, torch.Tensor], sample_idx: torch.Tensor, media: Media
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Inputs of the language model, labels and numbers of the samples, without the tokens of removed windows."""
    is_packed = bool((sample_idx[:, :1].ne(sample_idx) & sample_idx.ne(0)).any())
    position_ids = positions_in_samples(sample_idx)
    inputs["attention_mask"] = sample_idx.ne(0).long()
    if media.is_pruned:
        inputs, cut = model.cut_inputs(tuple(media.keep_masks), inputs, position_ids)
        sample_idx = cut.take(sample_idx, 0)
    if inputs.get("position_ids") is None:
        inputs["position_ids"] = positions_in_samples(sample_idx)
    if is_packed:
        implementation = model.config.get_text_config()._attn_implementation
        if implementation not in ("sdpa", TWO_PASS):
            raise ValueError(
                f'Packed rows need a mask that only "sdpa" and {TWO_PASS!r} take as `attn_implementation` of the '
                f"language model, got {implementation!r}."
            )
        inputs["attention_mask"] = packed_mask(sample_idx, inputs["mm_token_type_ids"])
    return inputs, inputs.pop("labels"), sample_idx


def positions_in_samples(sample_idx: torch.Tensor) -> torch.Tensor:
    """
    Args:
        sample_idx (`torch.Tensor` of shape `(num_rows, length)`): the tokens of a sample stand together.

    Returns:
        `torch.Tensor` of the same shape: 0, 1, 2, ... for every sample.
    """
    place = torch.arange(sample_idx.shape[1], device=sample_idx.device).expand_as(sample_idx)
    is_first = F.pad(sample_idx[:, 1:] != sample_idx[:, :-1], (1, 0), value=True)
    return place - (place * is_first).cummax(-1).values


def packed_mask(sample_idx: torch.Tensor, mm_token_type_ids: torch.Tensor) -> torch.Tensor:
    """
    Who sees whom: as natively, text what is before it and the tokens of images and videos each other; but only within
    a sample.

    Args:
        sample_idx, mm_token_type_ids (`torch.Tensor` of shape `(num_rows, length)`).

    Returns:
        `torch.Tensor` of shape `(num_rows, 1, length, length)`, bool.
    """
    length = sample_idx.shape[1]
    is_before = torch.ones(length, length, dtype=torch.bool, device=sample_idx.device).tril()
    is_vision = mm_token_type_ids == 1
    sees = is_before | (is_vision[:, :, None] & is_vision[:, None])
    return (sees & (sample_idx[:, :, None] == sample_idx[:, None]))[:, None]


def _temporal_loss(media: Media, like: torch.Tensor) -> torch.Tensor:
    loss = None if media.video is None else media.video.temporal_loss
    return like.new_zeros(()) if loss is None else loss


def _count_windows(media: Media, device: torch.device) -> dict[str, torch.Tensor]:
    keep_masks = () if media.video is None else media.video.keep_masks
    scores = () if media.video is None or media.video.scores is None else media.video.scores
    scores = torch.cat([torch.zeros(0, device=device), *(video.detach().flatten() for video in scores)]).double()
    return {
        "num_windows": torch.tensor(sum(mask.numel() for mask in keep_masks), device=device),
        "num_kept": sum((mask.sum() for mask in keep_masks), torch.tensor(0, device=device)),
        "score_sums": torch.stack([torch.ones_like(scores).sum(), scores.sum(), scores.square().sum()]),
    }


def _judge_answers(
    is_right: torch.Tensor, is_target: torch.Tensor, sample_idx: torch.Tensor
) -> dict[str, torch.Tensor]:
    # An answer is a run of labels: between two answers there is always a prompt.
    is_first = is_target & ~F.pad(is_target[:, :-1], (1, 0))
    answer = is_first.flatten().cumsum(0).view_as(is_target)[is_target] - 1
    right = torch.ones(int(is_first.sum()), dtype=torch.int, device=is_right.device)
    right = right.scatter_reduce(0, answer, is_right.int(), "amin")
    return {"answers_right": right.bool(), "answers_sample": sample_idx[:, 1:][is_first]}
