"""The vision tower of Molmo2 with STTS: windows are scored, chosen and dropped between its blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, ModelOutput
from transformers.models.molmo2.modeling_molmo2 import (
    Molmo2Adapter,
    Molmo2PreTrainedModel,
    Molmo2VisionAttention,
    Molmo2VisionEncoderLayer,
    Molmo2VisionMLP,
    Molmo2VisionModel,
    repeat_kv,
)

from .configuration_stts import SttsConfig
from .stts_attention import (
    MAX_BATCH_SIZE,
    attend_in_segments,
    attend_with_key_bias,
    attend_with_mask,
    can_attend_in_segments,
    score_to_key_bias,
)
from .stts_loss import neighbor_similarity, temporal_loss
from .stts_packing import Packing, pack_windows
from .stts_scorer import SttsScorer
from .stts_selection import PrunePlan, random_scores, select_windows


@dataclass
class Molmo2SttsVisionOutput(ModelOutput):
    """
    What the ViT returns for pruned videos.

    window_features (`torch.Tensor` of shape `(num_kept, num_patches, hidden_size * num_feature_layers)`):
        Patches of the kept windows of all videos, in order.
    keep_masks (`tuple[torch.Tensor]` of shape `(num_frames, num_windows)`, int64): 1 = kept, for each video.
    scores (`tuple[torch.Tensor]` of shape `(num_frames, num_windows)`, float32): for each video.
    temporal_loss (`torch.Tensor`, *optional*): scalar without weight, in training with the learned scorer.
    last_windows (`torch.Tensor` of shape `(1, num_windows, num_patches, hidden_size)`):
        Residual stream of the last frame after block `score_after_layer`.
    """

    window_features: torch.Tensor | None = None
    keep_masks: tuple[torch.Tensor, ...] | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    temporal_loss: torch.Tensor | None = None
    last_windows: torch.Tensor | None = None


class _Choice(NamedTuple):
    """
    Which windows are kept.

    scores, keep_masks (`tuple[torch.Tensor]` of shape `(num_frames, num_windows)`): for each video.
    key_bias (`torch.Tensor` of shape `(total_frames, num_windows)`, *optional*).
    temporal_loss (`torch.Tensor`, *optional*): scalar.
    """

    scores: tuple[torch.Tensor, ...]
    keep_masks: tuple[torch.Tensor, ...]
    key_bias: torch.Tensor | None
    temporal_loss: torch.Tensor | None


class Molmo2SttsVisionAttention(Molmo2VisionAttention):
    """
    Differences from `Molmo2VisionAttention`:
    - with `attention_mask` or `cu_seqlens`, attention runs by torch's own kernels whatever implementation is set,
      because flash attention has no mask and none of the others has segments;
    - an `attention_mask` of floating point, of shape `(batch_size, sequence_length)`, is a bias of the keys;
    - attention weights are not returned then.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if attention_mask is None and cu_seqlens is None:
            return super().forward(hidden_states, encoder_hidden_states, **kwargs)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        key, value = (repeat_kv(states, self.num_key_value_groups) for states in (key, value))
        if cu_seqlens is not None:
            output = attend_in_segments(query, key, value, cu_seqlens, max_seqlen)
        elif attention_mask.is_floating_point():
            output = attend_with_key_bias(query, key, value, attention_mask)
        else:
            output = attend_with_mask(query, key, value, attention_mask)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None


class Molmo2SttsVisionEncoderLayer(Molmo2VisionEncoderLayer):
    """
    Differences from `Molmo2VisionEncoderLayer`: its attention is a `Molmo2SttsVisionAttention`.
    """

    def __init__(self, config):
        super(Molmo2VisionEncoderLayer, self).__init__()
        self.embed_dim = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_eps)
        self.self_attn = Molmo2SttsVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_eps)
        self.mlp = Molmo2VisionMLP(config)


class Molmo2SttsVisionModel(Molmo2VisionModel):
    """
    Differences from `Molmo2VisionModel`:
    - has a `scorer`;
    - with a `PrunePlan`, patches stand in window order, the blocks after the biased one run on kept patches only, and
      the blocks after the last feature layer do not run at all;
    - frames then pass in two rounds of chunks: to where they are scored, and, once it is known what is kept of all
      frames, from there to the end.
    """

    _no_split_modules = ["Molmo2SttsVisionEncoderLayer", "SttsScorer"]

    def __init__(self, config):
        Molmo2PreTrainedModel.__init__(self, config)
        self.positional_embedding = nn.Parameter(torch.zeros(config.num_position_embeddings, config.hidden_size))
        self.patch_embedding = nn.Linear(
            config.patch_size * config.patch_size * config.num_channels, config.hidden_size
        )
        self.layers = nn.ModuleList([Molmo2SttsVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.scorer = SttsScorer(
            config.hidden_size, config.num_attention_heads, config.head_dim, config.intermediate_size
        )
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        # By identity: transformers asks custom code about modules with parameters of their own only, not the scorer.
        if any(module is linear for linear in self.scorer.mlp.children()):
            init.trunc_normal_(module.weight, std=module.in_features**-0.5)

    def forward(
        self,
        pixel_values: torch.Tensor,
        plan: PrunePlan | None = None,
        stts_config: SttsConfig | None = None,
        video_token_pooling: torch.Tensor | None = None,
        feature_layers: list[int] | None = None,
        previous_windows: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling | Molmo2SttsVisionOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(num_frames, num_patches, patch_size * patch_size * 3)`).
            plan (`PrunePlan`, *optional*): how many windows of each video go; without it nothing is pruned.
            stts_config (`SttsConfig`): how they are chosen.
            video_token_pooling (`torch.Tensor` of shape `(num_frames * num_windows, patches_per_window)`, int64):
                The patches of each window, into all patches. No -1 in it.
            feature_layers (`list[int]`): 0-based blocks whose outputs are returned for the kept windows.
            previous_windows (`torch.Tensor` of shape `(1, num_windows, num_patches, hidden_size)`, *optional*):
                `last_windows` of the frame before these, all of one video. The plan counts it as the first frame.
        """
        if plan is None:
            return super().forward(pixel_values, **kwargs)
        chunk_frames, biased_layer = stts_config.vision_chunk_frames, stts_config.score_after_layer + 1
        hidden_states, features = [], []
        for chunk in frame_chunks(pixel_values, video_token_pooling, plan.num_windows, chunk_frames):
            features.append(dict.fromkeys(feature_layers))
            hidden_states.append(self._run(0, biased_layer - 1, self._embed_windows(*chunk), features[-1]))
        num_chunks = len(hidden_states)
        hidden_states = torch.cat(hidden_states) if num_chunks > 1 else hidden_states[0]
        windows = hidden_states.unflatten(1, (plan.num_windows, -1))
        choice = self._choose(windows, plan, stts_config, previous_windows)

        keep_mask = torch.cat(choice.keep_masks)
        packings = pack_windows(
            keep_mask,
            keep_mask.numel() - sum(plan.num_pruned),
            windows.shape[2],
            stts_config.refill,
            can_attend_in_segments(hidden_states),
            chunk_frames,
        )
        size = len(windows) if chunk_frames is None else chunk_frames
        biases = [None] * num_chunks if choice.key_bias is None else choice.key_bias.split(size)
        kept_features = []
        for chunk_windows, bias, packing, early in zip(windows.split(size), biases, packings, features):
            if len(packing.kept_idx) > 0:
                kept = self._encode_kept(biased_layer, chunk_windows, bias, packing, early)
                kept_features.append(torch.cat([kept[layer] for layer in feature_layers], dim=-1))
        return Molmo2SttsVisionOutput(
            window_features=torch.cat(kept_features) if len(kept_features) > 1 else kept_features[0],
            keep_masks=tuple(mask.long() for mask in choice.keep_masks),
            scores=choice.scores,
            temporal_loss=choice.temporal_loss,
            # A copy, because a view would hold all windows.
            last_windows=windows[-1:].detach().clone(),
        )

    def _choose(
        self, windows: torch.Tensor, plan: PrunePlan, stts_config: SttsConfig, previous_windows: torch.Tensor | None
    ) -> _Choice:
        if previous_windows is not None:
            # It plays the first frame, which is kept and has no bias, and is taken away below.
            windows = torch.cat([previous_windows.to(windows), windows])
        scores = self.score_windows(windows, plan.num_frames, stts_config)
        keep_masks = tuple(select_windows(video_scores, count) for video_scores, count in zip(scores, plan.num_pruned))
        key_bias = self.key_bias(scores, plan, stts_config)
        has_loss = self.training and stts_config.method == "scorer"
        loss = _temporal_loss(scores, windows, plan, stts_config.vision_chunk_frames) if has_loss else None
        if previous_windows is not None:
            scores, keep_masks = (scores[0][1:],), (keep_masks[0][1:],)
            key_bias = None if key_bias is None else key_bias[1:]
        return _Choice(scores, keep_masks, key_bias, loss)

    def _encode_kept(
        self,
        biased_layer: int,
        windows: torch.Tensor,
        key_bias: torch.Tensor | None,
        packing: Packing,
        features: dict[int, torch.Tensor | None],
    ) -> dict[int, torch.Tensor]:
        """
        Runs a chunk of frames from the biased block on.

        Args:
            windows (`torch.Tensor` of shape `(num_frames, num_windows, num_patches, hidden_size)`).
            key_bias (`torch.Tensor` of shape `(num_frames, num_windows)`, *optional*).
            features (`dict[int, torch.Tensor]`): outputs of the feature layers before; `None` for the others.

        Returns:
            `dict[int, torch.Tensor]` of shape `(num_kept, num_patches, hidden_size)`: for each feature layer.
        """
        num_patches, features, last_layer = windows.shape[2], dict(features), max(features)
        if key_bias is not None:
            key_bias = key_bias.repeat_interleave(num_patches, dim=1)
        hidden_states = self._run(biased_layer, biased_layer, windows.flatten(1, 2), features, key_bias)
        self._run(
            biased_layer + 1,
            last_layer,
            packing.pack(hidden_states.reshape(-1, num_patches, hidden_states.shape[-1])),
            features,
            packing.attention_mask,
            cu_seqlens=packing.cu_seqlens,
            max_seqlen=hidden_states.shape[1],
        )
        kept = {
            layer: packing.unpack(states, num_patches)
            if layer > biased_layer
            else packing.take_kept(states.reshape(-1, num_patches, states.shape[-1]))
            for layer, states in features.items()
        }
        return {layer: states.to(kept[last_layer].device) for layer, states in kept.items()}

    def idle_scorer_loss(self) -> torch.Tensor:
        """A zero that the scorer took part in: distributed training waits for it in every batch."""
        return 0.0 * self.scorer(self.positional_embedding.new_zeros(1, 1, 1, self.config.hidden_size), [1]).sum()

    def _embed_windows(self, pixel_values: torch.Tensor, video_token_pooling: torch.Tensor) -> torch.Tensor:
        hidden_states = self.patch_embedding(pixel_values.to(dtype=self.dtype))
        hidden_states = hidden_states + self.positional_embedding[None].to(hidden_states)
        in_window_order = hidden_states.flatten(0, 1)[video_token_pooling.flatten().to(hidden_states.device)]
        return in_window_order.view_as(hidden_states)

    def _run(
        self,
        first: int,
        last: int,
        hidden_states: torch.Tensor,
        features: dict[int, torch.Tensor | None],
        attention_mask: torch.Tensor | None = None,
        **attention,
    ) -> torch.Tensor:
        """Runs the blocks `first` to `last`; puts the outputs of those that `features` names there."""
        for layer in range(first, last + 1):
            # The mask is positional, because checkpointed blocks give gradients to positional arguments only.
            hidden_states = self.layers[layer](hidden_states, attention_mask, **attention)
            if layer in features:
                features[layer] = hidden_states
        return hidden_states

    def score_windows(
        self, windows: torch.Tensor, num_frames: list[int], stts_config: SttsConfig
    ) -> tuple[torch.Tensor, ...]:
        """
        Scores the windows of each video. To try another rule, put a function in the place of this method.

        Args:
            windows (`torch.Tensor` of shape `(total_frames, num_windows, num_patches, hidden_size)`):
                Residual stream of all videos, one after the other, after block `score_after_layer`.
            num_frames (`list[int]`): frames of each video.

        Returns:
            `tuple[torch.Tensor]` of shape `(num_frames, num_windows)`, float32: for each video, higher = keep.
        """
        chunk_frames = stts_config.vision_chunk_frames
        if stts_config.method == "scorer":
            return self.scorer(windows, num_frames, chunk_frames).split(num_frames)
        if stts_config.method == "random":
            num_windows = windows.shape[1]
            return tuple(random_scores(n, num_windows, stts_config.seed).to(windows.device) for n in num_frames)
        similarities = neighbor_similarity(windows.detach(), num_frames, chunk_frames)
        return tuple(F.pad(1 - similarity, (0, 0, 1, 0), value=1.0) for similarity in similarities)

    def key_bias(
        self, scores: tuple[torch.Tensor, ...], plan: PrunePlan, stts_config: SttsConfig
    ) -> torch.Tensor | None:
        """
        Biases of the keys in the block after the scoring, through which the language loss reaches the scorer.

        Args:
            scores (`tuple[torch.Tensor]` of shape `(num_frames, num_windows)`): for each video.
            plan (`PrunePlan`): says which videos are pruned; the others get zeros.

        Returns:
            `torch.Tensor` of shape `(total_frames, num_windows)`, or `None` where scores are not learned.
        """
        if stts_config.method != "scorer":
            return None
        grids = torch.cat(scores).unflatten(1, (plan.num_rows, plan.num_cols))
        bias = score_to_key_bias(grids, plan.num_frames, stts_config.bias_floor).flatten(1)
        videos = zip(bias.split(plan.num_frames), plan.num_pruned)
        return torch.cat([video if num_pruned > 0 else torch.zeros_like(video) for video, num_pruned in videos])


def _temporal_loss(
    scores: tuple[torch.Tensor, ...], windows: torch.Tensor, plan: PrunePlan, chunk_frames: int | None
) -> torch.Tensor:
    similarities = neighbor_similarity(windows, plan.num_frames, chunk_frames)
    pruned = [video for video, num_pruned in enumerate(plan.num_pruned) if num_pruned > 0]
    return temporal_loss([scores[video] for video in pruned], [similarities[video] for video in pruned])


def frame_chunks(
    pixel_values: torch.Tensor, video_token_pooling: torch.Tensor, num_windows: int, chunk_frames: int | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The frames of each chunk and their pooling, which counts from the chunk's first patch."""
    if chunk_frames is None:
        yield pixel_values, video_token_pooling
        return
    poolings = video_token_pooling.split(chunk_frames * num_windows)
    for number, (frames, pooling) in enumerate(zip(pixel_values.split(chunk_frames), poolings)):
        first_patch = number * chunk_frames * pixel_values.shape[1]
        yield frames, torch.where(pooling < 0, pooling, pooling - first_patch)


class Molmo2SttsAdapter(Molmo2Adapter):
    """
    Differences from `Molmo2Adapter`:
    - without `pooled_patches_idx`, `image_features` stand in windows already;
    - more windows than a batch of attention may have are pooled in several.
    """

    def forward(
        self, image_features: torch.Tensor, pooled_patches_idx: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """
        Args:
            image_features (`torch.Tensor` of shape `(num_windows, patches_per_window, hidden_size * num_layers)`).

        Returns:
            `BaseModelOutput` whose `last_hidden_state` has shape `(num_windows, text_hidden_size)`.
        """
        windows = image_features if pooled_patches_idx is None else pooled_patches_idx
        if len(windows) > MAX_BATCH_SIZE:
            parts = windows.split(MAX_BATCH_SIZE)
            calls = [(part,) if pooled_patches_idx is None else (image_features, part) for part in parts]
            return BaseModelOutput(torch.cat([self(*call, **kwargs).last_hidden_state for call in calls]))
        if pooled_patches_idx is not None:
            return super().forward(image_features, pooled_patches_idx, **kwargs)
        query = image_features.mean(1, keepdim=True)
        pooled_features, _ = self.image_pooling_2d(query, image_features, **kwargs)
        return BaseModelOutput(last_hidden_state=self.image_projector(pooled_features.squeeze(1)))


__all__ = ["Molmo2SttsAdapter", "Molmo2SttsVisionModel", "frame_chunks"]
