"""Values and gradients of the reference implementation, case by case, through the public interface."""

import pytest
import torch
from golden_cases import CASES, NUM_WINDOWS, build_model, load_case, rename

from modeling_stts.stts_attention import score_to_key_bias
from modeling_stts.stts_packing import plan_bins


SINGLE_VIDEO = ["a_video6_r50", "c30_video8", "c80_video8"]
PRUNED = [name for name in CASES if name != "e_single_frame"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return load_case(request.param)


def expected_features(case, refill):
    t = case.tensors
    if "keepfirst/image_to_return" in t:
        return t["keepfirst/image_to_return"]
    features = t["eval/image_to_return" if refill else "norefill/image_to_return"]
    return features[case.kept_rows(t["eval/valid_token"])]


@pytest.mark.parametrize("refill", [True, False])
def test_matches_reference_golden_vectors(case, refill):
    with torch.no_grad():
        video = build_model(case, refill=refill).get_video_features(**case.inputs())
    torch.testing.assert_close(torch.cat(video.pooler_output), expected_features(case, refill), atol=1e-4, rtol=0)
    assert [len(features) for features in video.pooler_output] == [mask.sum().item() for mask in video.keep_masks]


@pytest.mark.parametrize("name", PRUNED)
def test_scores_and_masks_match_the_reference(name):
    case = load_case(name)
    with torch.no_grad():
        video = build_model(case).get_video_features(**case.inputs())
    scores, expected = torch.cat(video.scores), case.tensors["eval/scores"][case.frame_idx]
    # The reference scores a later video's first frame against the video before it: left out by rule.
    compared = [0] * (case.frame_idx[0] == 0) + case.later_frames()
    torch.testing.assert_close(scores[compared], expected[compared], atol=1e-5, rtol=0)
    kept = case.tensors["eval/prunable_valid_mask"]
    assert torch.equal(torch.cat(video.keep_masks).bool(), kept)


@pytest.mark.parametrize("name", PRUNED)
def test_key_bias_matches_the_reference(name):
    case = load_case(name)
    scores = case.tensors["eval/scores"][case.frame_idx].unflatten(1, (9, 9))
    ours = score_to_key_bias(scores, [frames for _, _, frames in case.videos], -2.0)
    theirs = case.tensors["eval/attn_bias"][case.frame_idx].view(-1, 27, 27)[:, ::3, ::3]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PRUNED)
def test_hidden_states_match_the_reference(name):
    case = load_case(name)
    model, inputs = build_model(case, refill=True), case.inputs()
    seen = []
    model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        video = model.get_video_features(**inputs)
    layers = case.config["vit_layers"]
    kept_patches = inputs["video_token_pooling"][torch.cat([mask.flatten() for mask in video.keep_masks]).bool()]
    order = kept_patches.flatten().argsort()
    of_video = torch.zeros_like(case.tensors["eval/valid_mask"])
    of_video[case.frame_idx] = True
    rows = of_video[case.tensors["eval/valid_mask"]]
    for layer, hidden_states in zip(layers, seen[0].flatten(0, 1)[order].chunk(len(layers), dim=-1)):
        expected = case.tensors[f"eval/hidden_layer{layer}_kept"][rows]
        torch.testing.assert_close(hidden_states, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PRUNED)
def test_temporal_loss_matches_the_reference(name):
    case = load_case(name)
    video = build_model(case).train().get_video_features(**case.inputs())
    t, frames = case.tensors, [case.frame_idx[i] for i in case.later_frames()]
    errors = t["train/scores"][frames] - (1 - t["train/neighbor_sims"][[frame - 1 for frame in frames]])
    torch.testing.assert_close(video.temporal_loss, errors.square().mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SINGLE_VIDEO)
@pytest.mark.parametrize("refill", [True, False])
def test_loss_and_gradients_match_the_reference(name, refill):
    case = load_case(name)
    model = build_model(case, refill=refill).train()
    video = model.get_video_features(**case.inputs())
    loss = torch.cat(video.pooler_output).square().mean() + 0.5 * video.temporal_loss
    loss.backward()
    expected_loss, prefix = ("train/loss", "train/grad/") if refill else ("norefill/train_loss", "norefill/grad/")
    torch.testing.assert_close(loss, case.tensors[expected_loss], atol=1e-5, rtol=0)
    assert_gradients_match(model, case.tensors, prefix)


@pytest.mark.parametrize("name", SINGLE_VIDEO)
def test_language_loss_reaches_the_scorer(name):
    case = load_case(name)
    model = build_model(case, refill=True).train()
    torch.cat(model.get_video_features(**case.inputs()).pooler_output).square().mean().backward()
    assert_gradients_match(model, case.tensors, "train/grad_features_only/")
    assert model.vision_tower.scorer.mlp.fc1.weight.grad.abs().max() > 1e-6


def assert_gradients_match(model, tensors, prefix):
    names = [key for key in tensors if key.startswith(prefix)]
    assert len(names) == 15
    for key in names:
        gradient = model.get_parameter(rename(key.removeprefix(prefix))).grad
        torch.testing.assert_close(gradient, tensors[key], atol=2e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", PRUNED)
def test_bins_match_the_reference(name):
    t = load_case(name).tensors
    lengths = t["eval/valid_mask"].sum(-1).tolist()
    plan = plan_bins(lengths, bin_size=729)
    assert plan.bin_idx == t["eval/frame_bin"].tolist()
    # The reference counts one more bin where exactly one frame is empty, and calls that frame refilled.
    one_empty = lengths.count(0) == 1
    assert plan.num_bins == t["eval/new_batch_size"].item() - one_empty
    has_dropped = [0 < length < 729 for length in lengths]
    refilled = [alone and dropped for alone, dropped in zip(plan.is_alone, has_dropped)]
    expected = [flag and length > 0 for flag, length in zip(t["eval/frame_refilled"].tolist(), lengths)]
    assert [flag for flag, length in zip(refilled, lengths) if length < 729] == [
        flag for flag, length in zip(expected, lengths) if length < 729
    ]


def test_ratio_zero_matches_the_unpruned_reference(case):
    with torch.no_grad():
        video = build_model(case, prune_ratio=0.0).get_video_features(**case.inputs())
    rows = case.kept_rows((case.tensors["inputs/pooled_patches_idx"] >= 0).any(-1))
    expected = case.tensors["noprune/image_to_return"][rows]
    torch.testing.assert_close(torch.cat(video.pooler_output), expected, atol=1e-4, rtol=0)
    assert all(mask.shape[1] == NUM_WINDOWS and mask.all() for mask in video.keep_masks)
