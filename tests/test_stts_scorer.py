import torch
from naive import score_video, window_patches

from modeling_stts.stts_scorer import SttsScorer


def test_scores_and_gradients_equal_the_naive_twin():
    scorer = SttsScorer(hidden_size=16, num_heads=2, head_dim=8, intermediate_size=12).double()
    frames = torch.randn(3, 729, 16, dtype=torch.double, requires_grad=True)
    windows = frames[:, torch.cat(window_patches())].unflatten(1, (81, 9))
    ours, naive = scorer(windows, [3]), score_video(scorer, list(frames), num_heads=2)
    torch.testing.assert_close(ours, naive.float())
    weight = torch.randn(3, 81)
    inputs = [frames, *scorer.parameters()]
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), inputs), torch.autograd.grad((naive * weight).sum(), inputs)
    ):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_a_score_depends_on_this_frame_and_the_one_before_only():
    scorer = SttsScorer(hidden_size=16, num_heads=2, head_dim=8, intermediate_size=12)
    windows = torch.randn(4, 81, 9, 16)
    changed = windows.clone()
    changed[1, 40] += 1
    differs = scorer(windows, [4]) != scorer(changed, [4])
    assert differs.nonzero().tolist() == [[1, 40], [2, 40]]


def test_half_precision_gives_float32_scores():
    scorer = SttsScorer(hidden_size=16, num_heads=2, head_dim=8, intermediate_size=12).bfloat16()
    scores = scorer(torch.randn(2, 81, 9, 16, dtype=torch.bfloat16), [2])
    assert scores.dtype == torch.float32
    assert ((scores > 0) & (scores < 1)).all()


def test_videos_never_see_each_other():
    scorer = SttsScorer(hidden_size=16, num_heads=2, head_dim=8, intermediate_size=12)
    windows = torch.randn(6, 4, 9, 16)
    together = scorer(windows, [3, 1, 2])
    alone = [scorer(video, [len(video)]) for video in windows.split([3, 1, 2])]
    torch.testing.assert_close(together, torch.cat(alone))
