"""The parts of a model that have learning rates of their own, can be frozen, or get LoRA adapters."""

import re

from torch import nn

from modeling_stts import Molmo2SttsForConditionalGeneration


# The first pattern that a weight's name holds says its group. PEFT puts words of its own between these.
GROUPS = {
    "scorer": r"\bscorer\.",
    "vision_tower": r"\bvision_tower\.",
    "connector": r"\bmulti_modal_projector\.",
    "language_model": "",
}
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


def group_of(name: str) -> str:
    """
    Args:
        name (`str`): of a weight.

    Returns:
        `str`: a key of `GROUPS`.
    """
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, name))


def freeze(model: Molmo2SttsForConditionalGeneration, frozen: list[str]) -> None:
    """
    Keeps groups from being trained, and what no loss reaches: blocks of the ViT after the last one whose output is
    used, and the scorer of a model whose windows are not chosen by it. Distributed training would wait for those.

    Args:
        model: changed in place.
        frozen (`list[str]`): keys of `GROUPS`.

    Raises:
        ValueError: if one is not, or if nothing is left to train.
    """
    unknown = [group for group in frozen if group not in GROUPS]
    if unknown:
        raise ValueError(f"Only {', '.join(GROUPS)} can be frozen, got {unknown[0]!r}.")
    frozen = [*frozen, *(["scorer"] if model.config.stts_config.method != "scorer" else [])]
    for name, weight in model.named_parameters():
        weight.requires_grad_(group_of(name) not in frozen)
    layers = model.model.vision_tower.layers
    used = [layer % len(layers) for layer in model.config.adapter_config.vision_feature_layer]
    layers[max(used) + 1 :].requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(f"Nothing is left to train when {', '.join(frozen)} are frozen.")


def add_lora(model: Molmo2SttsForConditionalGeneration, rank: int, alpha: float, dropout: float) -> nn.Module:
    """
    Freezes a model, but for its scorer if that was not frozen before, and adds LoRA adapters to the linear layers of
    its language model.

    Args:
        model: changed in place.
        rank (`int`), alpha (`float`), dropout (`float`): of the adapters, see `peft.LoraConfig`.

    Returns:
        `peft.PeftModel`: saves the adapters and the scorer alone.

    Raises:
        ValueError: if PEFT is not installed.
    """
    try:
        import peft  # only who trains adapters needs it
    except ImportError as error:
        raise ValueError('LoRA needs peft: pip install "modeling-stts[lora]".') from error
    scorer = model.model.vision_tower.scorer
    trains_scorer = any(weight.requires_grad for weight in scorer.parameters())
    # Like the adapters, which PEFT keeps in float32: half precision rounds small steps away.
    scorer.float()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=LORA_TARGETS,
        modules_to_save=["scorer"] if trains_scorer else None,
    )
    return peft.get_peft_model(model, config)


def group_weights(model: nn.Module, decayed: list[str]) -> list[dict]:
    """
    Trained weights by group, and by whether they decay.

    Args:
        model: after `freeze` and `add_lora`.
        decayed (`list[str]`): names of weights that decay.

    Returns:
        `list[dict]`: `group` (`str`), `decays` (`bool`) and `params` (`list[nn.Parameter]`) of each that has any.
    """
    groups = {(group, decays): [] for group in reversed(GROUPS) for decays in (True, False)}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            groups[group_of(name), name in decayed].append(weight)
    return [
        {"group": group, "decays": decays, "params": params} for (group, decays), params in groups.items() if params
    ]
