"""The settings of STTS (Spatio-Temporal Token Scoring, arXiv 2603.18004), with every check on their values."""

import math
from numbers import Real

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


METHODS = ("scorer", "similarity", "random")
POSITION_IDS = ("original", "compact")


def check_prune_ratio(prune_ratio: float | list[float]) -> float | list[float]:
    """
    Checks a fraction of windows to remove, or one for each video.

    Args:
        prune_ratio (`float` or `list[float]`):
            Fraction of a video's windows to remove, `0 <= prune_ratio < 1`; 0 removes nothing.

    Returns:
        `float` or `list[float]`: the same.

    Raises:
        ValueError: if one is not a number in that range (NaN is not).
    """
    if isinstance(prune_ratio, (list, tuple)):
        return [check_prune_ratio(one) for one in prune_ratio]
    is_number = isinstance(prune_ratio, Real) and not isinstance(prune_ratio, bool)
    if not is_number or not 0 <= prune_ratio < 1:
        raise ValueError(
            f"`prune_ratio` is the fraction of a video's windows to remove and must be a number with "
            f"0 <= prune_ratio < 1, got {prune_ratio!r}."
        )
    return float(prune_ratio)


@strict
class SttsConfig(PreTrainedConfig):
    r"""
    How a model prunes the tokens of a video.

    prune_ratio (`float`, *optional*, defaults to 0.5):
        Fraction of a video's windows that is removed, `0 <= prune_ratio < 1`. 0 switches pruning off.
    score_after_layer (`int`, *optional*, defaults to 3):
        0-based index of the ViT block after which windows are scored. They are removed after the next block.
    method (`str`, *optional*, defaults to `"scorer"`):
        What gives a window its score. `"scorer"`: the learned scorer of the paper. `"similarity"`: 1 - cosine to the
        same window of the previous frame. `"random"`: uniform noise. The last two need no training and no key bias.
    seed (`int`, *optional*, defaults to 0):
        Seed of `method="random"`. Every video draws from a generator of its own with this seed.
    bias_floor (`float`, *optional*, defaults to -2.0):
        Key bias of the lowest score of a row, below 0. The highest score of a row gets a bias of (almost) 0.
    temporal_loss_weight (`float`, *optional*, defaults to 0.5):
        Weight of the temporal loss in the training loss, at least 0.
    refill (`bool`, *optional*, defaults to `False`):
        Whether the dropped patches of a frame that is alone in its bin take part in attention, as in the reference
        implementation. A video's features then depend on the other videos of its batch.
    position_ids (`str`, *optional*, defaults to `"original"`):
        Positions of the kept tokens in the language model. `"original"`: those of the uncut prompt. `"compact"`:
        0, 1, 2, ... without gaps.
    prune_from_frame (`int`, *optional*, defaults to 0):
        Number of frames that do not count when the number of windows to remove is computed, at least 0. A video of at
        most this many frames is not pruned.
    vision_chunk_frames (`int`, *optional*):
        How many frames of a batch's videos pass the ViT at once, at least 1; all by default. Long videos need less
        memory in chunks and give the same numbers, up to rounding. Where parameters are gathered block by block, as
        under FSDP and ZeRO-3, every process must have as many chunks of which something is kept.
    """

    model_type = "stts"
    base_config_key = "stts_config"

    prune_ratio: float | int = 0.5
    score_after_layer: int = 3
    method: str = "scorer"
    seed: int = 0
    bias_floor: float | int = -2.0
    temporal_loss_weight: float | int = 0.5
    refill: bool = False
    position_ids: str = "original"
    prune_from_frame: int = 0
    vision_chunk_frames: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check_values()

    def check_values(self) -> None:
        """
        Checks every field by itself.

        Raises:
            ValueError: naming the first field that is out of its range.
        """
        check_prune_ratio(self.prune_ratio)
        if self.score_after_layer < 0:
            raise ValueError(f"`score_after_layer` must be at least 0, got {self.score_after_layer}.")
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {METHODS}, got {self.method!r}.")
        if not (math.isfinite(self.bias_floor) and self.bias_floor < 0):
            raise ValueError(f"`bias_floor` must be finite and below 0, got {self.bias_floor}.")
        if not (math.isfinite(self.temporal_loss_weight) and self.temporal_loss_weight >= 0):
            raise ValueError(f"`temporal_loss_weight` must be finite and at least 0, got {self.temporal_loss_weight}.")
        if self.position_ids not in POSITION_IDS:
            raise ValueError(f"`position_ids` must be one of {POSITION_IDS}, got {self.position_ids!r}.")
        if self.prune_from_frame < 0:
            raise ValueError(f"`prune_from_frame` must be at least 0, got {self.prune_from_frame}.")
        if self.vision_chunk_frames is not None and self.vision_chunk_frames < 1:
            raise ValueError(f"`vision_chunk_frames` must be at least 1, got {self.vision_chunk_frames}.")

    def check_num_layers(self, num_hidden_layers: int) -> None:
        """
        Checks that a ViT has a block to score after, one to bias, and at least one that pruning makes faster.

        Args:
            num_hidden_layers (`int`): number of blocks of the ViT.

        Raises:
            ValueError: if `score_after_layer` leaves no block to prune in.
        """
        if self.score_after_layer > num_hidden_layers - 3:
            raise ValueError(
                f"`score_after_layer`={self.score_after_layer} leaves no block to prune in: windows are removed after "
                f"block {self.score_after_layer + 1}, and the ViT's last block is {num_hidden_layers - 1}. It must be "
                f"at most {num_hidden_layers - 3}."
            )


__all__ = ["SttsConfig", "check_prune_ratio"]
