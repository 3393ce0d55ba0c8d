import numpy as np
import pytest

from modeling_stts import SttsConfig
from modeling_stts.configuration_stts import check_prune_ratio


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prune_ratio", 1.0, "0 <= prune_ratio < 1, got 1.0"),
        ("prune_ratio", -0.5, "0 <= prune_ratio < 1, got -0.5"),
        ("prune_ratio", float("nan"), "0 <= prune_ratio < 1, got nan"),
        ("score_after_layer", -1, "`score_after_layer` must be at least 0, got -1"),
        ("method", "scorers", r"`method` must be one of \('scorer', 'similarity', 'random'\), got 'scorers'"),
        ("bias_floor", 0.0, "`bias_floor` must be finite and below 0, got 0.0"),
        ("bias_floor", float("-inf"), "`bias_floor` must be finite and below 0, got -inf"),
        ("temporal_loss_weight", -1.0, "`temporal_loss_weight` must be finite and at least 0, got -1.0"),
        ("temporal_loss_weight", float("nan"), "`temporal_loss_weight` must be finite and at least 0, got nan"),
        ("position_ids", "gaps", r"`position_ids` must be one of \('original', 'compact'\), got 'gaps'"),
        ("vision_chunk_frames", 0, "`vision_chunk_frames` must be at least 1, got 0"),
        ("prune_from_frame", -2, "`prune_from_frame` must be at least 0, got -2"),
    ],
)
def test_values_out_of_range_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        SttsConfig(**{field: value})


def test_defaults_are_the_papers():
    config = SttsConfig()
    assert (config.prune_ratio, config.score_after_layer, config.temporal_loss_weight) == (0.5, 3, 0.5)
    assert (config.method, config.bias_floor, config.refill, config.position_ids) == (
        "scorer",
        -2.0,
        False,
        "original",
    )


def test_whole_numbers_are_ratios_too():
    assert check_prune_ratio(0) == 0.0
    assert check_prune_ratio(np.float32(0.5)) == 0.5
    assert check_prune_ratio([0, 0.5]) == [0.0, 0.5]
    with pytest.raises(ValueError, match="got 1.0"):
        check_prune_ratio([0.5, 1.0])
    assert SttsConfig(prune_ratio=0).prune_ratio == 0


@pytest.mark.parametrize(("score_after_layer", "fits"), [(0, True), (22, True), (23, False), (24, False), (40, False)])
def test_score_layer_leaves_a_block_to_prune_in(score_after_layer, fits):
    config = SttsConfig(score_after_layer=score_after_layer)
    if fits:
        config.check_num_layers(25)
    else:
        with pytest.raises(ValueError, match=f"`score_after_layer`={score_after_layer} leaves no block.* at most 22"):
            config.check_num_layers(25)
