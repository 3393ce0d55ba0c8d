import torch
from naive import temporal_loss as naive_temporal_loss
from naive import window_patches

from modeling_stts.stts_loss import neighbor_similarity, temporal_loss


def test_similarity_of_hand_made_windows():
    windows = torch.tensor([[[[1.0, 0.0]], [[2.0, 0.0]]], [[[0.0, 3.0]], [[5.0, 0.0]]], [[[1.0, 1.0]], [[-1.0, 0.0]]]])
    expected = torch.tensor([[0.0, 1.0], [0.5**0.5, -1.0]])
    assert torch.allclose(neighbor_similarity(windows, [3])[0], expected)
    one, two = neighbor_similarity(windows, [1, 2])
    assert one.shape == (0, 2) and torch.allclose(two, expected[1:])


def test_loss_and_gradients_equal_the_naive_twin():
    frames = torch.randn(4, 729, 5, requires_grad=True)
    scores = torch.rand(4, 81, requires_grad=True)
    windows = frames[:, torch.cat(window_patches())].unflatten(1, (81, 9))
    ours = temporal_loss([scores], neighbor_similarity(windows, [4]))
    naive = naive_temporal_loss(scores, list(frames))
    torch.testing.assert_close(ours, naive)
    for mine, other in zip(torch.autograd.grad(ours, [scores, frames]), torch.autograd.grad(naive, [scores, frames])):
        torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-4)


def test_videos_never_see_each_other():
    scores, windows = [torch.rand(3, 4), torch.rand(2, 4)], torch.randn(5, 4, 9, 5)
    together = temporal_loss(scores, neighbor_similarity(windows, [3, 2]))
    videos = windows.split([3, 2])
    alone = [temporal_loss([s], neighbor_similarity(video, [len(video)])) for s, video in zip(scores, videos)]
    torch.testing.assert_close(together, (2 * alone[0] + alone[1]) / 3)


def test_one_frame_has_no_loss():
    assert temporal_loss([torch.rand(1, 4)], neighbor_similarity(torch.randn(1, 4, 9, 5), [1])) == 0
