import copy
from collections import Counter

import naive
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from inputs import NUM_PATCHES, NUM_WINDOWS, PLACEHOLDER, lively_model, row_of, video_inputs
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionMaskInterface,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import modeling_stts.modeling_molmo2_stts as modeling
import modeling_stts.modeling_molmo2_stts_vision as vision_tower
import modeling_stts.stts_scorer as stts_scorer
import modeling_stts.stts_two_pass as stts_two_pass
from hub_upload.tiny import tiny_config, tiny_model, tiny_processor
from modeling_stts import SttsConfig
from modeling_stts.stts_selection import PrunePlan, count_pruned_windows, random_scores


VIDEO_NAMES = ("pixel_values_videos", "video_token_pooling", "video_grids")


def videos_of(inputs):
    return {name: inputs[name] for name in VIDEO_NAMES}


def native_twin(model):
    """Native Molmo2 with the same weights."""
    ours = ("model_type", "stts_config", "auto_map", "custom_pipelines", "architectures")
    config = Molmo2Config.from_dict({key: value for key, value in model.config.to_dict().items() if key not in ours})
    config._attn_implementation = model.config._attn_implementation
    native = Molmo2ForConditionalGeneration(config)
    _, unexpected = native.load_state_dict(model.state_dict(), strict=False)
    assert all(".scorer." in name for name in unexpected)
    native.generation_config = copy.deepcopy(model.generation_config)
    return native.eval()


def naive_logits(model, inputs, prune_ratio, compact=False):
    """Logits of a prompt without padding, and where its tokens stood, by the naive twin."""
    frames = inputs["pixel_values_videos"]
    count = count_pruned_windows(len(frames), NUM_WINDOWS, prune_ratio)
    features, _, keep = naive.video_features(model.model, frames, count)
    flags = iter(keep.flatten().tolist())
    tokens = inputs["input_ids"][0].tolist()
    kept = [i for i, token in enumerate(tokens) if token != PLACEHOLDER or next(flags)]
    positions = list(range(len(kept))) if compact else kept
    tokens = [tokens[i] for i in kept]
    return naive.language_logits(native_twin(model), tokens, features, PLACEHOLDER, positions), kept


@pytest.fixture(scope="module")
def model():
    return lively_model(prune_ratio=0.5)


# --- what is off is exactly off ---


@pytest.mark.parametrize("side", ["left", "right"])
def test_ratio_zero_equals_native_molmo2(model, side):
    native, inputs = native_twin(model), video_inputs((4, 1, 3), side)
    with torch.no_grad():
        assert torch.equal(model(**inputs, prune_ratio=0.0).logits, native(**inputs).logits)
    if side == "left":
        ours = model.generate(**inputs, prune_ratio=0.0, max_new_tokens=5, do_sample=False)
        assert torch.equal(ours, native.generate(**inputs, max_new_tokens=5, do_sample=False))


def test_a_video_of_one_frame_equals_native_molmo2(model):
    inputs = video_inputs((1,))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, native_twin(model)(**inputs).logits)


def test_text_only_equals_native_molmo2(model):
    inputs = {"input_ids": torch.arange(20, 40)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, native_twin(model)(**inputs).logits)


def test_images_are_never_pruned(model):
    generator = torch.Generator().manual_seed(0)
    pooling = torch.arange(729).view(-1, 9)
    inputs = {
        "pixel_values": torch.randn(2, 729, 12, generator=generator),
        "image_token_pooling": torch.cat([pooling, pooling + 729]),
        "image_grids": torch.tensor([[9, 9, 9, 9]]),
        "input_ids": torch.tensor([[5, *[PLACEHOLDER] * 162, 30, 31]]),
    }
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == PLACEHOLDER).long()
    with torch.no_grad():
        ours = model(**inputs, prune_ratio=0.8)
        assert torch.equal(ours.logits, native_twin(model)(**inputs).logits)
    assert ours.kept_token_idx is None
    generated = model.generate(**inputs, prune_ratio=0.8, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, native_twin(model).generate(**inputs, max_new_tokens=4, do_sample=False))


# --- features ---


@pytest.mark.parametrize("prune_ratio", [0.3, 0.8])
@pytest.mark.parametrize("feature_layers", [[7, 5], [-1, 2], [4, 1], [5, 4]])
def test_features_equal_the_naive_twin(prune_ratio, feature_layers):
    model = lively_model()
    model.config.adapter_config.vision_feature_layer = feature_layers
    inputs = video_inputs((4,))
    with torch.no_grad():
        video = model.get_video_features(**videos_of(inputs), prune_ratio=prune_ratio)
        count = count_pruned_windows(4, NUM_WINDOWS, prune_ratio)
        features, scores, keep = naive.video_features(model.model, inputs["pixel_values_videos"], count)
    assert torch.equal(video.keep_masks[0].bool(), keep)
    torch.testing.assert_close(video.scores[0], scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(video.pooler_output[0], features, atol=1e-4, rtol=1e-4)


def test_scorer_gradients_equal_the_naive_twin():
    model, inputs = lively_model(), video_inputs((3,))
    ours = model.get_video_features(**videos_of(inputs), prune_ratio=0.5).pooler_output[0]
    expected, _, _ = naive.video_features(model.model, inputs["pixel_values_videos"], 121)
    parameters = list(model.model.vision_tower.scorer.parameters())
    gradients = (torch.autograd.grad(features.square().mean(), parameters) for features in (ours, expected))
    for mine, other in zip(*gradients):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("method", ["scorer", "similarity", "random"])
def test_a_video_is_unaffected_by_its_batch_neighbours(method):
    model, inputs = lively_model(method=method), video_inputs((4, 1, 6))
    with torch.no_grad():
        together = model.get_video_features(**videos_of(inputs), prune_ratio=0.6)
        for row in range(3):
            alone = model.get_video_features(**videos_of(row_of(inputs, row)), prune_ratio=0.6)
            assert torch.equal(together.keep_masks[row], alone.keep_masks[0])
            torch.testing.assert_close(together.pooler_output[row], alone.pooler_output[0], atol=1e-4, rtol=1e-4)


def test_similarity_keeps_what_changed():
    model, inputs = lively_model(method="similarity"), video_inputs((3,))
    still = inputs["pixel_values_videos"][:1].repeat(3, 1, 1)
    moving = inputs["video_token_pooling"][40]
    still[1, moving] = torch.randn(9, 12)
    still[2] = still[1]
    with torch.no_grad():
        video = model.get_video_features(still, inputs["video_token_pooling"], inputs["video_grids"], prune_ratio=0.5)
    assert video.keep_masks[0][1, 40] == 1
    assert video.scores[0][1].argmax() == 40
    assert video.scores[0][2].abs().max() < 1e-4


def test_random_pruning_follows_the_seed():
    inputs = videos_of(video_inputs((4,)))
    with torch.no_grad():
        models = [lively_model(method="random", seed=seed) for seed in (0, 0, 1)]
        masks = [model.get_video_features(**inputs).keep_masks[0] for model in models]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert masks[0].sum() == 4 * NUM_WINDOWS - 162


def test_outputs_hold_no_bool_tensors(model):
    with torch.no_grad():
        video = model.get_video_features(**videos_of(video_inputs((2, 3))))
    assert [mask.dtype for mask in video.keep_masks] == [torch.int64] * 2
    assert type(video)().pooler_output is None  # `generate` slices outputs by building new ones


# --- frames in chunks ---


def features_and_gradients(model, inputs, chunk_frames, prune_ratio=0.6):
    """Features of the videos, and the gradients, by name, that a loss on them gives the ViT and the connector."""
    model.config.stts_config.vision_chunk_frames = chunk_frames
    video = model.get_video_features(**videos_of(inputs), prune_ratio=prune_ratio)
    loss = sum((features**2).mean() for features in video.pooler_output)
    if video.temporal_loss is not None:
        loss = loss + video.temporal_loss
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    parameters = dict(named for part in parts for named in part.named_parameters())
    return video, dict(zip(parameters, torch.autograd.grad(loss, parameters.values(), allow_unused=True)))


def assert_same(ours, expected):
    (video, gradients), (expected_video, expected_gradients) = ours, expected
    assert all(map(torch.equal, video.keep_masks, expected_video.keep_masks))
    for name in ("scores", "pooler_output", "temporal_loss"):
        torch.testing.assert_close(getattr(video, name), getattr(expected_video, name), atol=1e-4, rtol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values() if gradient is not None)
    for name, other in expected_gradients.items():
        # The gradient of a bias of keys is 0: what there is of it is rounding, which follows the other gradients.
        floor = 1e-7 * largest if name.endswith("k_proj.bias") else 5e-6
        # Sums over all patches in another order: rounding follows the largest element.
        atol = None if other is None else 1e-4 * other.abs().max().item() + floor
        torch.testing.assert_close(gradients[name], other, atol=atol, rtol=None if other is None else 1e-3)


# Without shrinking, which would take many minutes.
@settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    num_frames=st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda n: 1 < sum(n) < 6),
    method=st.sampled_from(["scorer", "similarity", "random"]),
    refill=st.booleans(),
    data=st.data(),
)
def test_chunks_change_neither_values_nor_gradients(num_frames, method, refill, data):
    model, inputs = lively_model(method=method, refill=refill).train(), video_inputs(num_frames)
    chunk_frames = data.draw(st.integers(1, sum(num_frames) + 2))
    assert_same(features_and_gradients(model, inputs, chunk_frames), features_and_gradients(model, inputs, None))


@pytest.mark.parametrize("feature_layers", [[-1, 2], [4, 3]])
def test_chunks_give_the_features_of_every_layer(feature_layers):
    model, inputs = lively_model(), video_inputs((3, 2))
    model.config.adapter_config.vision_feature_layer = feature_layers
    assert_same(features_and_gradients(model, inputs, 2), features_and_gradients(model, inputs, None))


def test_a_chunk_of_which_nothing_is_kept():
    model, inputs = lively_model(method="similarity"), video_inputs((4,))
    inputs["pixel_values_videos"][1] = inputs["pixel_values_videos"][0]
    ours = features_and_gradients(model, inputs, 1, prune_ratio=0.5)
    assert ours[0].keep_masks[0][1].sum() == 0
    assert_same(ours, features_and_gradients(model, inputs, None, prune_ratio=0.5))


def test_unpruned_videos_in_chunks_equal_native_molmo2(model):
    inputs, expected = video_inputs((4, 1, 2)), copy.deepcopy(model)
    expected.config.stts_config.vision_chunk_frames = 3
    with torch.no_grad():
        ours = expected.get_video_features(**videos_of(inputs), prune_ratio=0.0)
        native = native_twin(model).get_video_features(**videos_of(inputs), return_dict=True)
    torch.testing.assert_close(ours.pooler_output, native.pooler_output, atol=1e-4, rtol=1e-4)
    assert ours.hidden_states is None and ours.num_pruned == 0


@pytest.mark.parametrize("prune_ratio", [0.0, 0.5])
def test_no_batch_of_windows_is_larger_than_attention_takes(monkeypatch, prune_ratio):
    model, inputs = lively_model(), videos_of(video_inputs((4, 1, 2)))
    expected = model.get_video_features(**inputs, prune_ratio=prune_ratio)
    most, batch_sizes = 2 * NUM_WINDOWS + 1, []
    for module in (vision_tower, stts_scorer):
        monkeypatch.setattr(module, "MAX_BATCH_SIZE", most)
    for pooler in (model.model.vision_tower.scorer.window_pooler, model.model.multi_modal_projector.image_pooling_2d):
        pooler.register_forward_pre_hook(lambda pooler, args: batch_sizes.append(len(args[0])))
    ours = model.get_video_features(**inputs, prune_ratio=prune_ratio)
    torch.testing.assert_close(ours.pooler_output, expected.pooler_output, atol=1e-4, rtol=1e-4)
    assert max(batch_sizes) <= most and len(batch_sizes) > 3


def test_gradient_checkpointing_in_chunks_changes_nothing():
    inputs, gradients = video_inputs((3, 2)), []
    for chunk_frames in (None, 2):
        model = lively_model(vision_chunk_frames=chunk_frames).train()
        if chunk_frames is not None:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        gradients.append([p.grad for p in model.model.vision_tower.scorer.parameters()])
    for plain, chunked in zip(*gradients):
        torch.testing.assert_close(chunked, plain, atol=1e-6, rtol=1e-3)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside it take at one time."""

    def __init__(self):
        super().__init__()
        self.bytes_of, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.bytes_of[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.bytes_of = {key: value for key, value in self.bytes_of.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self.bytes_of.values()))
        return result


@pytest.mark.parametrize("method, chunk_frames", [("scorer", None), ("scorer", 2), ("similarity", 2)])
def test_in_chunks_memory_grows_by_one_hidden_state_of_the_frames(method, chunk_frames):
    """And by its copy while it is put together; at once it grows by all that a block makes of it."""
    model, peaks = lively_model(method=method, vision_chunk_frames=chunk_frames), []
    for num_frames in (12, 20):
        inputs = videos_of(video_inputs((num_frames,)))
        with torch.no_grad(), PeakMemory() as memory:
            model.get_video_features(**inputs, prune_ratio=0.9)
        peaks.append(memory.peak)
    growth = (peaks[1] - peaks[0]) / (8 * NUM_PATCHES * model.config.vision_config.hidden_size * 4)
    assert growth > 5 if chunk_frames is None else growth < 2.2


# --- a video that is not yet complete ---


def next_frames(inputs, start, stop):
    """The inputs of some frames of the only video."""
    return {
        "pixel_values_videos": inputs["pixel_values_videos"][start:stop],
        "video_token_pooling": inputs["video_token_pooling"][: (stop - start) * NUM_WINDOWS],
        "video_grids": torch.tensor([[stop - start, 9, 9]]),
    }


def in_turn(model, inputs, lengths, prune_ratio):
    """What is returned for one part of a video after the other."""
    parts, start = [], 0
    for length in lengths:
        frames = next_frames(inputs, start, start + length)
        previous = parts[-1] if parts else None
        with torch.no_grad():
            parts.append(model.get_next_video_features(**frames, prune_ratio=prune_ratio, previous=previous))
        start += length
    return parts


@pytest.mark.parametrize("vision_chunk_frames", [None, 2])
@pytest.mark.parametrize("method", ["scorer", "similarity"])
@pytest.mark.parametrize("lengths", [(3, 3), (1, 1, 3, 2)])
def test_next_frames_equal_the_whole_video_with_the_same_keep_mask(monkeypatch, lengths, method, vision_chunk_frames):
    model = lively_model(method=method, vision_chunk_frames=vision_chunk_frames)
    inputs = video_inputs((sum(lengths),))
    parts = in_turn(model, inputs, lengths, prune_ratio=0.6)
    keep_mask = torch.cat([part.keep_masks[0] for part in parts]).bool()
    monkeypatch.setattr(vision_tower, "select_windows", lambda scores, num_pruned: keep_mask)
    monkeypatch.setattr(
        modeling, "plan_pruning", lambda *args: PrunePlan([sum(lengths)], 9, 9, [int((~keep_mask).sum())])
    )
    with torch.no_grad():
        whole = model.get_video_features(**videos_of(inputs))
    torch.testing.assert_close(torch.cat([part.scores[0] for part in parts]), whole.scores[0], atol=1e-5, rtol=0)
    features = torch.cat([part.pooler_output[0] for part in parts])
    torch.testing.assert_close(features, whole.pooler_output[0], atol=1e-4, rtol=1e-4)


def test_next_frames_keep_the_same_share_every_time(model):
    parts = in_turn(model, video_inputs((9,)), [2, 2, 2, 2, 1], prune_ratio=0.75)
    # Of 162 windows 121 go; the first frame stays whole, which leaves its 81.
    assert [len(part.pooler_output[0]) for part in parts] == [81, 41, 41, 41, 21]
    assert parts[0].keep_masks[0][0].all() and not parts[1].keep_masks[0][0].all()
    assert [part.num_pruned for part in parts] == [81, 121, 121, 121, 60]
    # What goes on to the next frames is of one size, and holds no more than it shows.
    for part in parts:
        assert part.last_windows.shape == (1, 81, 9, 32)
        assert part.last_windows.untyped_storage().nbytes() == 81 * 9 * 32 * 4


def test_next_frames_without_pruning_equal_native_molmo2(model):
    inputs = video_inputs((4,))
    parts = in_turn(model, inputs, [1, 3], prune_ratio=0.0)
    with torch.no_grad():
        native = native_twin(model).get_video_features(**videos_of(inputs), return_dict=True).pooler_output[0]
    features = torch.cat([part.pooler_output[0] for part in parts])
    torch.testing.assert_close(features, native, atol=1e-4, rtol=1e-4)


def test_next_frames_of_several_videos_or_after_others_are_refused(model):
    with pytest.raises(ValueError, match="takes frames of one video, got 2 videos"):
        model.get_next_video_features(**videos_of(video_inputs((2, 3))))
    inputs = videos_of(video_inputs((2,)))
    with torch.no_grad():
        unpruned = model.get_video_features(**inputs, prune_ratio=0.0)
    with pytest.raises(ValueError, match=r"must have the shape \(1, 81, 9, 32\) of these frames, got None"):
        model.get_next_video_features(**inputs, previous=unpruned)
    with pytest.raises(ValueError, match="0 <= prune_ratio < 1, got 1"):
        model.get_next_video_features(**inputs, prune_ratio=1)


# --- the language model on the cut prompt ---


@pytest.mark.parametrize("prune_ratio", [0.3, 0.8])
@pytest.mark.parametrize("position_ids", ["original", "compact"])
def test_logits_equal_the_naive_twin(prune_ratio, position_ids):
    model, inputs = lively_model(position_ids=position_ids), video_inputs((4,))
    with torch.no_grad():
        outputs = model(**inputs, prune_ratio=prune_ratio)
        expected, kept = naive_logits(model, inputs, prune_ratio, compact=position_ids == "compact")
    assert outputs.kept_token_idx.tolist() == [kept]
    torch.testing.assert_close(outputs.logits[0], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_equal_single_rows(model, side):
    inputs = video_inputs((4, 2, 6), side)
    with torch.no_grad():
        outputs = model(**inputs)
        for row in range(3):
            single = row_of(inputs, row)
            real = outputs.kept_token_idx[row] >= 0
            expected = model(**single)
            torch.testing.assert_close(outputs.logits[row, real], expected.logits[0], atol=1e-3, rtol=1e-3)
            offset = inputs["attention_mask"][row].argmax()
            assert torch.equal(outputs.kept_token_idx[row, real] - offset, expected.kept_token_idx[0])
    assert outputs.logits.shape[1] == max(
        inputs["attention_mask"].sum(1) - torch.tensor([count_pruned_windows(n, 81, 0.5) for n in (4, 2, 6)])
    )


def test_no_mask_is_a_mask_of_ones(model):
    inputs = video_inputs((3,))
    with torch.no_grad():
        expected = model(**inputs).logits
        inputs.pop("attention_mask")
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs, use_cache=False).logits, expected)


def test_embeddings_can_be_given_instead_of_ids(model):
    inputs = video_inputs((3,))
    with torch.no_grad():
        expected = model(**inputs).logits
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        torch.testing.assert_close(model(**inputs, inputs_embeds=embeddings).logits, expected)


def test_base_model_cuts_like_the_full_model(model):
    inputs = video_inputs((3,))
    with torch.no_grad():
        hidden_states = model.model(**inputs).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden_states), model(**inputs).logits)


def test_decoding_by_hand_goes_on_after_the_uncut_prompt(model):
    inputs = video_inputs((3,))
    token = torch.tensor([[77]])
    longer = dict(inputs, input_ids=torch.cat([inputs["input_ids"], token], 1))
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    longer["mm_token_type_ids"] = (longer["input_ids"] == PLACEHOLDER).long()
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        step = model(input_ids=token, past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(step, model(**longer).logits[:, -1], atol=1e-4, rtol=1e-4)


def test_several_videos_in_one_prompt(model):
    """No processor of Molmo2 makes such prompts, but the model takes them."""
    inputs = video_inputs((3, 2))
    inputs["input_ids"] = torch.cat([row_of(inputs, row)["input_ids"] for row in range(2)], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == PLACEHOLDER).long()
    with torch.no_grad():
        assert torch.equal(model(**inputs, prune_ratio=0.0).logits, native_twin(model)(**inputs).logits)
        outputs = model(**inputs)
        videos = [
            naive.video_features(model.model, frames, count_pruned_windows(len(frames), NUM_WINDOWS, 0.5))
            for frames in inputs["pixel_values_videos"].split([3, 2])
        ]
        tokens = inputs["input_ids"][0, outputs.kept_token_idx[0]].tolist()
        features = torch.cat([features for features, _, _ in videos])
        positions = outputs.kept_token_idx[0].tolist()
        expected = naive.language_logits(native_twin(model), tokens, features, PLACEHOLDER, positions)
    torch.testing.assert_close(outputs.logits[0], expected, atol=1e-3, rtol=1e-3)


# --- training ---


def labels_of(inputs):
    text = (inputs["input_ids"] != PLACEHOLDER) & (inputs["attention_mask"] == 1)
    return inputs["input_ids"].masked_fill(~text | (inputs["input_ids"] >= 256), -100)


def test_loss_is_language_loss_on_cut_labels_plus_temporal_loss():
    model, inputs = lively_model(temporal_loss_weight=0.25).train(), video_inputs((4, 2), "right")
    outputs = model(**inputs, labels=labels_of(inputs))
    assert outputs.labels.shape == outputs.logits.shape[:2] == outputs.kept_token_idx.shape
    taken = labels_of(inputs).gather(1, outputs.kept_token_idx.clamp(min=0))
    assert torch.equal(outputs.labels, taken.masked_fill(outputs.kept_token_idx < 0, -100))
    language = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), outputs.labels[:, 1:].flatten())
    assert outputs.temporal_loss > 0
    torch.testing.assert_close(outputs.loss, language + 0.25 * outputs.temporal_loss)
    assert model.eval()(**inputs, labels=labels_of(inputs)).temporal_loss is None


def test_labels_are_returned_where_nothing_is_cut_too(model):
    inputs = video_inputs((1,))
    outputs = model(**inputs, labels=labels_of(inputs))
    assert torch.equal(outputs.labels, labels_of(inputs))


def test_text_that_is_hidden_between_real_tokens_keeps_its_label(model):
    inputs = video_inputs((2,))
    labels, hidden = labels_of(inputs), inputs["input_ids"].shape[1] - 3
    inputs["attention_mask"][0, hidden] = 0
    outputs = model(**inputs, labels=labels)
    assert (outputs.labels != -100).sum() == (labels != -100).sum()
    assert hidden in outputs.kept_token_idx


def test_another_stts_config_takes_effect_at_once():
    model, inputs = lively_model(), videos_of(video_inputs((3,)))
    model.config.stts_config = SttsConfig(method="random", prune_ratio=0.3)
    with torch.no_grad():
        video = model.get_video_features(**inputs)
    assert video.num_pruned == count_pruned_windows(3, NUM_WINDOWS, 0.3)
    assert torch.equal(video.scores[0], random_scores(3, NUM_WINDOWS, seed=0))


def test_language_loss_reaches_the_scorer():
    model, inputs = lively_model(temporal_loss_weight=0.0).train(), video_inputs((4,))
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    for name, parameter in model.model.vision_tower.scorer.named_parameters():
        assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias")


@pytest.mark.parametrize("case", ["text", "image", "ratio 0", "random"])
def test_a_batch_without_pruned_video_gives_the_scorer_a_zero_gradient(case):
    model = lively_model(method="random" if case == "random" else "scorer").train()
    if case in ("ratio 0", "random"):
        inputs = video_inputs((2,))
    else:
        inputs = {"input_ids": torch.arange(20, 40)[None]}
        inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    if case == "image":
        inputs["input_ids"] = torch.tensor([[5, *[PLACEHOLDER] * 81, 30]])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == PLACEHOLDER).long()
        inputs |= {"pixel_values": torch.randn(1, 729, 12), "image_token_pooling": torch.arange(729).view(-1, 9)}
        inputs["image_grids"] = torch.tensor([[9, 9, 0, 0]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    outputs = model(**inputs, labels=labels_of(inputs), prune_ratio=0.0 if case == "ratio 0" else 0.5)
    outputs.loss.backward()
    assert outputs.temporal_loss == 0
    assert all((p.grad is not None) and not p.grad.any() for p in model.model.vision_tower.scorer.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    inputs, gradients = video_inputs((3, 2)), []
    for checkpointing in (False, True):
        model = lively_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        gradients.append([p.grad for p in model.model.vision_tower.scorer.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)


# --- implementations and dtypes ---


@pytest.mark.parametrize("refill", [False, True])
def test_eager_equals_sdpa(refill):
    inputs, logits = video_inputs((4, 2)), []
    for implementation in ("sdpa", "eager"):
        model = lively_model(refill=refill)
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    real = model(**inputs).kept_token_idx >= 0
    torch.testing.assert_close(logits[1][real], logits[0][real], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, inputs = lively_model(), video_inputs((3, 2))
    with torch.no_grad():
        expected = model(**inputs)
        outputs = model.to(dtype)(**inputs)
    assert outputs.logits.dtype == dtype and torch.isfinite(outputs.logits).all()
    assert outputs.logits.shape == expected.logits.shape
    model.train()(**inputs, labels=labels_of(inputs)).loss.backward()
    assert torch.isfinite(model.model.vision_tower.scorer.mlp.fc1.weight.grad).all()


def test_flash_attention_of_the_language_model_needs_compact_positions(model):
    model = copy.deepcopy(model)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="Flash attention reads positions with gaps"):
        model(**video_inputs((3,)))


# --- decoding ---


class Operators(TorchDispatchMode):
    """Counts the operators that run inside it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def operators_of_a_step(model, inputs, **kwargs):
    """Of the fourth step of decoding."""
    counts = []
    for num_new in (4, 5):
        with Operators() as operators:
            model.generate(**inputs, max_new_tokens=num_new, do_sample=False, **kwargs)
        counts.append(operators.counts)
    return counts[1] - counts[0]


@pytest.mark.parametrize("position_ids", ["original", "compact"])
@pytest.mark.parametrize("num_frames", [(3,), (3, 2)])
def test_a_decoding_step_has_the_operators_of_native_molmo2(num_frames, position_ids):
    model, inputs = lively_model(position_ids=position_ids), video_inputs(num_frames)
    expected = operators_of_a_step(native_twin(model), inputs)
    assert sum(expected.values()) > 100
    for prune_ratio in (0.0, 0.5):
        assert operators_of_a_step(model, inputs, prune_ratio=prune_ratio) == expected


# --- two passes instead of a mask ---


@pytest.fixture(params=[1, 64])
def two_passes(request, monkeypatch):
    """Lets the CPU attend in two passes, of multiples of so many tokens. Returns the layouts that are made."""
    monkeypatch.setitem(stts_two_pass.LENGTH_MULTIPLES, "cpu", request.param)
    layouts, lay_out = [], modeling.lay_out_tokens
    monkeypatch.setattr(modeling, "find_kernel", lambda *shape: "cpu")
    monkeypatch.setattr(
        modeling,
        "_is_for_two_passes",
        lambda config, prompt: config._attn_implementation == modeling.TWO_PASS and prompt.shape[1] > 1,
    )
    monkeypatch.setattr(modeling, "lay_out_tokens", lambda *args: layouts.append(lay_out(*args)) or layouts[-1])
    return layouts


@pytest.fixture
def two_pass_model(two_passes, model):
    model.set_attn_implementation({"text_config": modeling.TWO_PASS})
    return model


@pytest.mark.parametrize(("side", "prune_ratio"), [("left", 0.6), ("right", 0.0)])
def test_two_passes_equal_the_dense_mask(two_passes, side, prune_ratio):
    models = [lively_model().train(), lively_model().train()]
    models[0].set_attn_implementation({"text_config": modeling.TWO_PASS})
    models[1].set_attn_implementation("eager")
    inputs, results = video_inputs((3, 1, 2), side), []
    # The first real token would be predicted from padding, which may hold anything.
    labels = labels_of(inputs).masked_fill(inputs["attention_mask"].roll(1, 1) == 0, -100)
    for model in models:
        outputs = model(**inputs, labels=labels, prune_ratio=prune_ratio)
        outputs.loss.backward()
        results.append(outputs)
    assert len(two_passes) == 1 and two_passes[0].is_filler is not None
    real = results[0].labels != -100
    torch.testing.assert_close(results[0].logits[real], results[1].logits[real], atol=1e-3, rtol=1e-3)
    for (name, ours), (_, dense) in zip(*(model.named_parameters() for model in models)):
        if dense.grad is not None:
            torch.testing.assert_close(ours.grad, dense.grad, atol=1e-4, rtol=2e-3, msg=name)


def test_the_backward_pass_gets_tokens_first_without_a_copy(two_passes, monkeypatch):
    backward, copied = stts_two_pass._causal_attention_backward, []

    def look(kernel, scaling, rng_states, grad_output, query, key, value, output, lse):
        for tensor in (grad_output, output):
            copied.append(stts_two_pass._tokens_first(tensor).data_ptr() != tensor.data_ptr())
        return backward(kernel, scaling, rng_states, grad_output, query, key, value, output, lse)

    monkeypatch.setattr(stts_two_pass, "_causal_attention_backward", look)
    model, inputs = lively_model().train(), video_inputs((3, 2), "right")
    model.set_attn_implementation({"text_config": modeling.TWO_PASS})
    model(**inputs, labels=labels_of(inputs), prune_ratio=0.5).loss.backward()
    assert copied == [False] * 4 * model.config.text_config.num_hidden_layers


def test_a_prompt_that_hides_tokens_between_others_gets_the_dense_mask(two_passes, two_pass_model):
    inputs = video_inputs((2,))
    inputs["attention_mask"][0, 40] = 0
    with torch.no_grad():
        logits = two_pass_model(**inputs, prune_ratio=0.0).logits
        assert torch.equal(logits, native_twin(two_pass_model)(**inputs).logits)
    assert two_passes == [None]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_in_two_passes(two_passes, two_pass_model, cache):
    inputs = video_inputs((4, 2))
    kwargs = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    generated = two_pass_model.generate(**inputs, **kwargs)
    assert len(two_passes) == 1 and two_passes[0].order is not None
    eager = lively_model()
    eager.set_attn_implementation("eager")
    assert torch.equal(generated, eager.generate(**inputs, **kwargs))


def test_no_mask_is_as_large_as_the_prompt_squared(two_pass_model, monkeypatch):
    sizes, to_mask = [], AttentionMaskInterface._global_mapping[modeling.TWO_PASS]
    monkeypatch.setitem(
        AttentionMaskInterface._global_mapping,
        modeling.TWO_PASS,
        lambda **kwargs: sizes.append(kwargs["q_length"]) or to_mask(**kwargs),
    )
    two_pass_model.generate(**video_inputs((4, 2)), max_new_tokens=3, cache_implementation="static")
    assert set(sizes) == {1}


@pytest.mark.parametrize("side", ["left", "right"])
def test_below_two_passes_the_dense_mask_is_converted_once_for_all_layers(side):
    inputs, logits, counts = video_inputs((3, 2), side), [], []
    for implementation in ("sdpa", modeling.TWO_PASS):
        model = lively_model()
        model.set_attn_implementation({"text_config": implementation})
        with torch.no_grad(), Operators() as operators:
            logits.append(model(**inputs, prune_ratio=0.5).logits)
        counts.append(operators.counts["aten::where.self"])
    assert torch.equal(*logits)
    assert counts[0] - counts[1] == model.config.text_config.num_hidden_layers - 1 > 0


def test_packed_positions_and_filled_caches_are_not_for_two_passes(two_passes, two_pass_model):
    model = two_pass_model
    ids = torch.arange(20, 30)[None]
    inputs = {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        model(**inputs, position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]), use_cache=False)
        assert two_passes == []
        cache = model(**inputs, use_cache=True).past_key_values
        model(**inputs, past_key_values=cache)
    assert len(two_passes) == 1


@pytest.mark.parametrize("implementation", [None, "eager", {"text_config": "sdpa_two_pass"}, "sdpa_two_pass"])
def test_the_attention_implementation_of_the_caller_is_kept(tmp_path, implementation):
    tiny_model().save_pretrained(tmp_path)
    given = {} if implementation is None else {"attn_implementation": implementation}
    config = type(tiny_model()).from_pretrained(tmp_path, **given).config
    of_text = implementation["text_config"] if isinstance(implementation, dict) else implementation or "sdpa"
    assert config.text_config._attn_implementation == of_text
    of_vision = "sdpa" if isinstance(implementation, dict) else of_text
    assert config.vision_config._attn_implementation == of_vision


# --- bad input ---


@pytest.mark.parametrize("prune_ratio", [1, -0.1, float("nan"), "half", True])
def test_a_ratio_out_of_range_is_refused(model, prune_ratio):
    inputs = video_inputs((2,))
    with pytest.raises(ValueError, match="0 <= prune_ratio < 1, got"):
        model(input_ids=torch.arange(20, 30)[None], prune_ratio=prune_ratio)
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="0 <= prune_ratio < 1, got"):
            call(**inputs, prune_ratio=prune_ratio)


def test_a_setting_that_was_changed_to_what_cannot_be_is_refused(model):
    inputs = videos_of(video_inputs((2,)))
    for call in (model.get_video_features, model.get_next_video_features):
        for name, value in (("vision_chunk_frames", 0), ("prune_ratio", 1), ("method", "none")):
            before = getattr(model.config.stts_config, name)
            setattr(model.config.stts_config, name, value)
            with pytest.raises(ValueError, match=f"`{name}` .*must be .*got {value!r}"):
                call(**inputs)
            setattr(model.config.stts_config, name, before)


def test_a_prompt_that_does_not_fit_its_video_is_refused(model):
    inputs = video_inputs((2,))
    for ids, count in ((inputs["input_ids"][:, 50:], 115), (inputs["input_ids"].clone().fill_(30), 0)):
        bad = dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=torch.zeros_like(ids))
        for call in (model, model.generate):
            for prune_ratio in (0.5, 0.0):
                with pytest.raises(ValueError, match=f"hold {count} video tokens, but its videos have 162 windows"):
                    call(**bad, prune_ratio=prune_ratio)


def test_too_many_frames_for_the_positions_are_refused(model):
    model = copy.deepcopy(model)
    model.config.text_config.max_position_embeddings = 200
    inputs = video_inputs((4,))
    for call in (model, model.generate):
        for prune_ratio in (0.5, 0.0):
            with pytest.raises(ValueError, match="takes 341 positions .* Sample fewer frames .*compact"):
                call(**inputs, prune_ratio=prune_ratio)
    model.config.stts_config.position_ids = "compact"
    assert model(**inputs).logits.shape[1] == 341 - 162


def test_a_mask_of_another_shape_is_refused(model):
    inputs = video_inputs((2,))
    inputs["attention_mask"] = torch.ones(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"must have the prompt's shape \(1, 173\), got \(1, 1, 4, 4\)"):
        model(**inputs)


def test_features_that_do_not_fit_their_grid_are_refused(model):
    inputs = video_inputs((3,))
    with pytest.raises(ValueError, match="describes 2 frames of 81 windows, but `pixel_values_videos` has 3 frames"):
        model(**dict(inputs, video_grids=torch.tensor([[2, 9, 9]])))
    with pytest.raises(ValueError, match="windows that cover a frame exactly"):
        model(**dict(inputs, video_token_pooling=inputs["video_token_pooling"][:, :4]))


def test_compact_positions_cannot_be_given():
    model, inputs = lively_model(position_ids="compact"), video_inputs((2,))
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    with pytest.raises(ValueError, match="`position_ids` cannot be given"):
        model(**inputs)


def test_image_and_video_together_are_refused_as_natively(model):
    with pytest.raises(ValueError, match="pixel_values and pixel_values_videos are provided at the same time"):
        model(**video_inputs((2,)), pixel_values=torch.zeros(1, 729, 12))
    with pytest.raises(ValueError, match="One call takes videos, images .* got videos and another"):
        model.generate(**video_inputs((2,)), pixel_values=torch.zeros(1, 729, 12))


# --- from a file to the cut prompt ---


def test_tokens_after_a_timestamp_are_that_frames(clip):
    """The cut prompt still reads 'time <frame_start> kept tokens <frame_end>' for every frame."""
    model, config = lively_model(), tiny_config()
    processor = tiny_processor(config)
    chat = [{"role": "user", "content": [{"type": "video", "path": str(clip)}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        video = model.get_video_features(**videos_of(inputs), prune_ratio=0.8)
        cut = inputs["input_ids"][0, model(**inputs, prune_ratio=0.8).kept_token_idx[0]].tolist()
    starts = [i for i, token in enumerate(cut) if token == config.frame_start_token_id]
    ends = [i for i, token in enumerate(cut) if token == config.frame_end_token_id]
    kept_by_frame = video.keep_masks[0].sum(1).tolist()
    assert [end - start - 1 for start, end in zip(starts, ends)] == kept_by_frame
    assert len(set(kept_by_frame)) > 1
    texts = [processor.decode(cut[start - 4 : start]) for start in starts]
    # 20 frames at 4 a second, 8 of them: every second and a half frame, rounded down.
    assert texts == [f"{frame / 4:.1f} " for frame in (0, 2, 5, 7, 10, 12, 15, 17)]


# --- weights by the names of checkpoints ---


def test_weights_are_loaded_by_the_names_they_are_saved_by(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    other = type(model)(model.config)
    assert not saved.keys() <= other.state_dict().keys()
    other.load_state_dict(saved)
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in model.state_dict().items())


def test_weights_that_are_missing_or_unknown_are_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    del saved["lm_head.weight"]
    saved["unknown.weight"] = torch.ones(1)
    other = type(model)(model.config)
    before = other.lm_head.weight.clone()
    result = other.load_state_dict(saved, strict=False)
    assert result.missing_keys == ["lm_head.weight"] and result.unexpected_keys == ["unknown.weight"]
    assert torch.equal(other.lm_head.weight, before)
    with pytest.raises(RuntimeError, match="unknown.weight"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("max_shard_size", ["1GB", "100kB"])
def test_a_plain_trainer_goes_on_from_a_checkpoint_to_the_same_weights(tmp_path, monkeypatch, max_shard_size):
    save = modeling.Molmo2SttsForConditionalGeneration.save_pretrained
    monkeypatch.setattr(
        modeling.Molmo2SttsForConditionalGeneration,
        "save_pretrained",
        lambda self, *args, **kwargs: save(self, *args, **kwargs, max_shard_size=max_shard_size),
    )

    def train(resume_from_checkpoint=None):
        torch.manual_seed(1)
        model = lively_model(prune_ratio=0.5).train()
        args = TrainingArguments(
            str(tmp_path), max_steps=2, save_steps=1, learning_rate=1e-2, use_cpu=True, remove_unused_columns=False
        )
        inputs = video_inputs((3,), side="right")
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == PLACEHOLDER, -100)
        trainer = Trainer(model, args, train_dataset=[inputs] * 8, data_collator=lambda items: items[0])
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        return model.state_dict()

    whole, rest = train(), train(str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(weight, rest[name]) for name, weight in whole.items())
