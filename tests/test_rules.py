import pytest
import torch
from conversations import frames_to_inputs
from model import make_model, make_tokenizer
from rules import RULES, apply_rule, frame_pairs, plain_bias, random_windows, uniform_stride


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def windows(num_frames=4, num_windows=36):
    return torch.randn(num_frames, num_windows, 9, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [name for name in RULES if name != "unpruned"])
def test_every_rule_prunes_a_video_to_the_same_number_and_keeps_the_first_frame(tokenizer, name):
    model = make_model(tokenizer, seed=0).eval()
    apply_rule(model, name)
    frames = torch.randint(0, 256, (1, 4, 3, 108, 108), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        video = model.get_video_features(**frames_to_inputs(frames), prune_ratio=0.5)
    assert video.num_pruned == 72 and video.pooler_output[0].shape == (72, 256)
    assert video.keep_masks[0][0].all()


def test_stride_keeps_windows_at_even_distances():
    scores = uniform_stride(windows(8), [8], None)[0].flatten()
    for num_kept in (29, 58, 144, 202):
        kept = scores.topk(num_kept).indices.sort().values
        gaps = kept.diff()
        assert gaps.max() <= 2 * 288 / num_kept + 1
        assert len(gaps.unique()) <= 3


def test_frame_pairs_by_hand():
    # Two dimensions; the mean of the first frame points to the right, so the window that points up is the odd one.
    first = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, -0.1]])
    second = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    scores = frame_pairs(torch.stack([first, second])[:, :, None], [2], None)[0]
    assert scores[0].argmax() == 2
    assert scores[1].argmax() == 3
    assert sorted(scores[1].tolist()) == [0, 0.25, 0.5, 0.75]


def test_frame_pairs_drop_the_same_number_of_every_frame():
    scores = frame_pairs(windows(6), [6], None)[0]
    assert all(sorted(row.tolist()) == sorted(scores[0].tolist()) for row in scores)


def test_random_scores_are_new_in_every_call():
    assert not torch.equal(*(random_windows(windows(), [4], None)[0] for _ in range(2)))


def test_plain_bias_is_the_logarithm_and_zero_in_first_frames():
    scores = [torch.full((2, 3), 0.5), torch.full((3, 3), 0.25)]
    expected = torch.tensor([0, 0.5, 0, 0.25, 0.25]).log().nan_to_num(neginf=0.0)
    torch.testing.assert_close(plain_bias(scores, None, None), expected[:, None].expand(5, 3))


def test_the_scorer_without_key_bias_gets_no_gradient_from_the_language_loss(tokenizer):
    norms = {}
    for name in ("stts", "stts without key bias"):
        model = make_model(tokenizer, seed=0).train()
        apply_rule(model, name)
        frames = torch.randint(0, 256, (1, 3, 3, 108, 108), generator=torch.Generator().manual_seed(0)).byte()
        video = model.get_video_features(**frames_to_inputs(frames), prune_ratio=0.5)
        video.pooler_output[0].square().sum().backward()
        norms[name] = model.model.vision_tower.scorer.mlp.fc3.weight.grad.norm()
    assert norms["stts"] > 0
    assert norms["stts without key bias"] < 1e-4 * norms["stts"]


def test_an_unknown_rule_is_refused(tokenizer):
    with pytest.raises(ValueError, match="must be one of .*'stts'.* got 'best'"):
        apply_rule(make_model(tokenizer, seed=0), "best")
