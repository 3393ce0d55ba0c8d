"""Reads `config.yaml` of the reference's native checkpoints."""

import math
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from modeling_stts import Molmo2SttsConfig, Molmo2SttsProcessor

from .tiny import TOKEN_FIELDS


CONFIG_FILE = "config.yaml"
ROPE_PREFIX = "rope_"
# Fields of the language model that begin with the prefix, but are no parameters of a scaled RoPE.
OTHER_ROPE_FIELDS = ("rope_theta", "rope_type", "rope_full_precision", "rope_impl")


class Section:
    """A part of `config.yaml`; it says by its full name what is missing or not supported."""

    def __init__(self, path: Path, name: str, fields: Any):
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: `{name}` is missing or not a section.")
        self.path, self.name, self.fields = path, name, fields

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.path}: `{self.name}.{key}` is missing.")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The field, or the default where it is missing or empty."""
        value = self.fields.get(key)
        return default if value is None else value

    def section(self, key: str) -> "Section":
        """A section in this one."""
        return Section(self.path, f"{self.name}.{key}", self.get(key))

    def check(self, key: str, supported: Any) -> None:
        """Raises a `ValueError` if the field is there and not the one value that can be converted."""
        if self.get(key, supported) != supported:
            raise ValueError(
                f"{self.path}: `{self.name}.{key}` must be {supported!r} to be converted, got {self.get(key)!r}."
            )


def read_native_config(path: Path) -> Section:
    """
    Reads the `model` section of a `config.yaml`.

    Raises:
        ValueError: if it is not YAML or has no such section.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return Section(path, "model", content.get("model") if isinstance(content, dict) else None)


def convert_config(
    model: Section, tokenizer: PreTrainedTokenizerBase, max_position_embeddings: int | None
) -> Molmo2SttsConfig:
    """
    Our configuration for a native checkpoint.

    Args:
        model (`Section`): the `model` section of its `config.yaml`.
        tokenizer (`PreTrainedTokenizerBase`): has the ids of the special tokens.
        max_position_embeddings (`int`, *optional*): longest prompt in tokens; the checkpoint's own if not given.

    Raises:
        ValueError: naming a field that is missing or has a value that this model cannot have.
    """
    backbone, llm = model.section("vision_backbone"), model.section("llm")
    vit = backbone.section("vit")
    num_layers = vit["image_num_layers"]
    feature_layers = [layer % num_layers for layer in backbone["vit_layers"]]
    return Molmo2SttsConfig(
        # The declared layers after the last one whose output is used are never run, and may have no weights.
        vision_config={**_vision_fields(vit), "num_hidden_layers": max(feature_layers) + 1},
        adapter_config=_adapter_fields(backbone, vit, llm, feature_layers),
        text_config=_text_fields(llm, max_position_embeddings),
        stts_config=_stts_fields(vit) if is_pruned(model) else {},
        initializer_range=llm["initializer_range"],
        tie_word_embeddings=False,
        **{field: _token_id(tokenizer, token) for field, token in TOKEN_FIELDS.items()},
    )


def apply_preprocessing(model: Section, processor: Molmo2SttsProcessor) -> None:
    """
    Sets what the native checkpoint's `mm_preprocessor` says about frames and crops in a processor.

    Args:
        model (`Section`): the `model` section of `config.yaml`.
        processor (`Molmo2SttsProcessor`): is changed.

    Raises:
        ValueError: naming a field that is missing or cannot be converted.
    """
    preprocessor = model.section("mm_preprocessor")
    image, video = preprocessor.section("image"), preprocessor.section("video")
    video.check("time_mode", "per-frame-compact")
    max_fps = video["max_fps"]
    if isinstance(max_fps, list):
        if len(max_fps) != 1:
            raise ValueError(f"{model.path}: `{video.name}.max_fps` must be one number, got {max_fps}.")
        max_fps = max_fps[0]
    processor.image_processor.max_crops = image["max_crops"]
    processor.image_processor.pooling_size = [image["pooling_h"], image["pooling_w"]]
    processor.video_processor.num_frames = video["max_frames"]
    processor.video_processor.max_fps = max_fps
    processor.video_processor.pooling_size = [video["pooling_h"], video["pooling_w"]]
    processor.use_single_crop_start_token = image["use_single_crop_start_token"]
    processor.use_frame_special_tokens = video["use_frame_special_tokens"]


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    number = tokenizer.convert_tokens_to_ids(token)
    if number is None or number == tokenizer.unk_token_id:
        raise ValueError(f"The tokenizer of {tokenizer.name_or_path} has no token {token!r}; it is not one of Molmo2.")
    return number


def _heads(vit: Section) -> dict[str, Any]:
    return {
        "hidden_size": vit["image_emb_dim"],
        "num_attention_heads": vit["image_num_heads"],
        "num_key_value_heads": vit["image_num_key_value_heads"],
        "head_dim": vit["image_head_dim"],
    }


def _vision_fields(vit: Section) -> dict[str, Any]:
    vit.check("image_model_type", "siglip")
    return {
        **_heads(vit),
        "intermediate_size": vit["image_mlp_dim"],
        "hidden_act": vit["image_mlp_activations"],
        "layer_norm_eps": vit["image_norm_eps"],
        "image_size": list(vit["image_default_input_size"]),
        "patch_size": vit["image_patch_size"],
        "num_position_embeddings": vit["image_num_pos"],
        "initializer_range": vit["initializer_range"],
    }


def _adapter_fields(backbone: Section, vit: Section, llm: Section, feature_layers: list[int]) -> dict[str, Any]:
    for key, supported in {
        "image_pooling_2d": "attention_meanq",
        "image_projector": "mlp",
        "pooling_attention_mask": True,
    }.items():
        backbone.check(key, supported)
    return {
        **_heads(vit),
        "vision_feature_layer": feature_layers,
        "intermediate_size": _mlp_size(llm),
        "text_hidden_size": llm["d_model"],
        "initializer_range": llm["initializer_range"],
    }


def _mlp_size(llm: Section) -> int:
    # Gate and up projection together, as they are fused.
    return llm.get("mlp_hidden_size", llm.get("mlp_ratio", 4) * llm["d_model"]) // 2


def _text_fields(llm: Section, max_position_embeddings: int | None) -> dict[str, Any]:
    llm.check("activation_type", "swiglu")
    llm.check("attention_layer_norm", True)
    own_length = llm.get("max_position_embeddings", llm.get("max_sequence_length"))
    return {
        "hidden_size": llm["d_model"],
        "num_attention_heads": llm["n_heads"],
        "num_key_value_heads": llm.get("n_kv_heads", llm["n_heads"]),
        "head_dim": llm.get("head_dim", llm["d_model"] // llm["n_heads"]),
        "vocab_size": llm.get("embedding_size", llm.get("vocab_size")),
        "additional_vocab_size": llm["additional_vocab_size"],
        "attention_bias": llm["qkv_bias"],
        "num_hidden_layers": llm["n_layers"],
        "intermediate_size": _mlp_size(llm),
        "max_position_embeddings": max_position_embeddings or own_length,
        "rope_parameters": _rope(llm),
        "rope_scaling_layers": _scaled_layers(llm),
        "qk_norm_type": llm["attention_layer_norm_type"],
        "rms_norm_eps": llm["layer_norm_eps"],
        "norm_after": llm["norm_after"],
        "initializer_range": llm["initializer_range"],
    }


def _rope(llm: Section) -> dict[str, Any]:
    rope = {"rope_type": llm.get("rope_type", "default"), "rope_theta": float(llm["rope_theta"])}
    if rope["rope_type"] == "default":
        return rope
    scaling = {
        key.removeprefix(ROPE_PREFIX): value
        for key, value in llm.fields.items()
        if key.startswith(ROPE_PREFIX) and key not in OTHER_ROPE_FIELDS and value is not None
    }
    return {**rope, **scaling}


def _scaled_layers(llm: Section) -> list[int] | None:
    full = llm.get("full_attention_layers")
    if full is None:
        return None
    if llm.get("sliding_attention_rope_scaling", False):
        return [layer for layer in range(llm["n_layers"]) if layer not in full]
    return list(full)


def is_pruned(model: Section) -> bool:
    """Whether a native checkpoint was trained with STTS, so that it has a scorer."""
    return bool(model.section("vision_backbone").section("vit").get("prune", False))


def _stts_fields(vit: Section) -> dict[str, Any]:
    for key, supported in {"prune_method": "scorer", "pruning_in_scorer": True, "merge": False}.items():
        vit.check(key, supported)
    return {
        "prune_ratio": vit["topk"],
        "score_after_layer": vit["prune_at"],
        "temporal_loss_weight": vit["sim_reg_loss_coefficient"],
        "bias_floor": math.log(vit["rescale_bias_min"]),
        "prune_from_frame": vit["prune_from_frame"],
        # What the checkpoint was trained with.
        "refill": True,
    }
