import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive import keep_windows

from modeling_stts.stts_selection import (
    count_pruned_windows,
    kept_window_idx,
    plan_pruning,
    random_scores,
    select_windows,
)


@pytest.mark.parametrize(
    ("num_frames", "prune_ratio", "prune_from_frame", "expected"),
    [
        (6, 0.5, 0, 243),
        (3, 0.5, 0, 121),  # 121.5 is cut off
        (60, 0.35, 0, 1701),  # doubles would give 1700
        (330, 0.3, 0, 8018),  # doubles would give 8019
        (8, 0.0, 0, 0),
        (1, 0.5, 0, 0),  # the only frame is the first one
        (2, 0.9, 0, 81),  # 145 asked for, one frame to take them from
        (6, 0.5, 2, 162),
        (2, 0.5, 2, 0),
        (2, 0.5, 5, 0),
    ],
)
def test_count_of_pruned_windows(num_frames, prune_ratio, prune_from_frame, expected):
    assert count_pruned_windows(num_frames, 81, prune_ratio, prune_from_frame) == expected


@given(st.integers(1, 2000), st.floats(0, 1, exclude_max=True))
def test_count_is_the_reference_rule_clipped(num_frames, ratio):
    count = count_pruned_windows(num_frames, 81, ratio)
    assert count == min(np.trunc(np.float32(81 * ratio) * np.float32(num_frames)), 81 * (num_frames - 1))


def test_lowest_scores_of_the_whole_video_are_dropped():
    scores = torch.tensor([[0.1, 0.1, 0.1], [0.9, 0.2, 0.8], [0.3, 0.7, 0.4]])
    keep_mask = select_windows(scores, 3)
    assert keep_mask.tolist() == [[True, True, True], [True, False, True], [False, True, False]]


def test_equal_scores_are_dropped_from_the_front():
    keep_mask = select_windows(torch.full((3, 3), 0.5), 4)
    assert keep_mask.tolist() == [[True, True, True], [False, False, False], [False, True, True]]


@given(st.integers(1, 6), st.integers(0, 400), st.integers(0, 10_000), st.booleans())
def test_first_frame_is_always_kept(num_frames, count, seed, with_ties):
    scores = torch.rand(num_frames, 81, generator=torch.Generator().manual_seed(seed))
    scores = (scores * 4).round() / 4 if with_ties else scores
    count = min(count, 81 * (num_frames - 1))
    keep_mask = select_windows(scores, count)
    assert keep_mask[0].all()
    assert keep_mask.sum() == 81 * num_frames - count
    assert torch.equal(keep_mask, keep_windows(scores, count))


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_kept_window_idx_is_nonzero_with_a_known_length(flags):
    mask = torch.tensor(flags)
    assert kept_window_idx(mask, sum(flags)).tolist() == mask.nonzero().flatten().tolist()


def test_plan_of_a_batch():
    plan = plan_pruning([[4, 9, 9], [1, 9, 9]], 0.5)
    assert (plan.num_frames, plan.num_pruned, plan.num_kept, plan.num_windows) == ([4, 1], [162, 0], [162, 81], 81)


def test_videos_with_different_grids_are_refused():
    with pytest.raises(ValueError, match=r"one grid of windows, got \[\(8, 8\), \(9, 9\)\]"):
        plan_pruning([[4, 9, 9], [4, 8, 8]], 0.5)


def test_a_ratio_for_each_video():
    assert plan_pruning([[4, 9, 9], [4, 9, 9]], [0.5, 0.25]).num_pruned == [162, 81]
    with pytest.raises(ValueError, match="Got 1 values of `prune_ratio` for 2 videos"):
        plan_pruning([[4, 9, 9], [4, 9, 9]], [0.5])


def test_random_scores_follow_the_seed():
    assert torch.equal(random_scores(3, 81, seed=1), random_scores(3, 81, seed=1))
    assert not torch.equal(random_scores(3, 81, seed=1), random_scores(3, 81, seed=2))
