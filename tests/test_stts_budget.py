import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_stts.stts_budget import HIGHEST_RATIO, make_budget
from modeling_stts.stts_selection import count_pruned_windows


WINDOWS = st.sampled_from([9, 36, 81, 196])
LENGTHS = st.integers(1, 2048)
RATIOS = st.floats(0, 0.99)


def num_kept(num_frames, num_windows, ratio):
    return num_frames * num_windows - count_pruned_windows(num_frames, num_windows, ratio)


@given(WINDOWS, LENGTHS, st.integers(0, 200_000), RATIOS)
def test_a_limit_is_held_exactly_with_as_many_frames_as_the_highest_ratio_allows(num_windows, length, more, ratio):
    limit, highest = num_windows + more, max(ratio, HIGHEST_RATIO)
    budget = make_budget(num_windows, None, limit, ratio)
    num_frames = budget.scale_frames(length)
    assert 1 <= num_frames <= length
    assert num_kept(num_frames, num_windows, highest) <= limit
    assert num_frames == length or num_kept(num_frames + 1, num_windows, highest) > limit
    raised = budget.raise_ratio(length, num_frames)
    assert num_kept(num_frames, num_windows, raised) == min(limit, num_kept(num_frames, num_windows, ratio))
    assert ratio <= raised < 1 and (raised == ratio or raised <= highest + 1 / num_windows)


@given(WINDOWS, LENGTHS, st.floats(1, 8), RATIOS, st.floats(0, 1))
def test_more_frames_keep_as_many_windows(num_windows, length, scale, ratio, share):
    budget = make_budget(num_windows, scale, None, ratio)
    scaled = budget.scale_frames(length)
    assert scaled == round(scale * length)
    num_sampled = length + round(share * (scaled - length))  # a short video does not have more
    raised = budget.raise_ratio(length, num_sampled)
    assert num_kept(num_sampled, num_windows, raised) == num_kept(length, num_windows, ratio)


@given(LENGTHS, st.floats(1, 8), st.integers(81, 100_000), RATIOS)
def test_both_hold_together(length, scale, limit, ratio):
    budget = make_budget(81, scale, limit, ratio)
    num_frames = budget.scale_frames(length)
    kept = num_kept(num_frames, 81, budget.raise_ratio(length, num_frames))
    assert kept == min(limit, num_kept(length, 81, ratio), num_kept(num_frames, 81, ratio))


def test_nothing_is_asked_for():
    assert make_budget(81, None, None, 0.5) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None, 80, 0.5), "`max_video_tokens` must be at least 81, .*; got 80"),
        ((None, -1, 0.5), "`max_video_tokens` must be at least 81"),
        ((0.5, None, 0.5), "`frame_scale` must be a number that is at least 1, got 0.5"),
        ((float("inf"), None, 0.5), "`frame_scale` must be a number that is at least 1, got inf"),
        ((float("nan"), None, 0.5), "`frame_scale` must be a number that is at least 1, got nan"),
        ((2, None, None), "`frame_scale`=2 needs `prune_ratio`"),
        ((None, 500, 1.0), "`prune_ratio` is the fraction"),
    ],
)
def test_what_cannot_hold_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_budget(81, *arguments)
