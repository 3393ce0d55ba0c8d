import naive
import pytest
import torch
from finetuning.collator import Collator
from finetuning.forward import idle_zero, packed_mask, positions_in_samples, training_forward
from finetuning.groups import freeze, group_of
from inputs import lively_model, video_inputs
from training_inputs import NUM_FRAMES, NUM_WINDOWS, encode_rows, training_model, write_mixed


PAD = 256


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return encode_rows(write_mixed(tmp_path_factory.mktemp("mixed")))


def run(model, batch, ratio):
    inputs = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    return training_forward(model, **inputs, prune_ratio=ratio)


def alone(model, item, ratio):
    """Sum of the language loss over the labels, and temporal loss, of one sample by the native call."""
    inputs = {name: value for name, value in item.items() if torch.is_tensor(value)}
    inputs |= {name: inputs[name][None] for name in ("input_ids", "labels", "mm_token_type_ids")}
    mask = torch.ones_like(inputs["input_ids"])
    outputs = model(**inputs, attention_mask=mask, prune_ratio=ratio)
    weight = model.config.stts_config.temporal_loss_weight
    return (outputs.loss - weight * outputs.temporal_loss) * (inputs["labels"][:, 1:] != -100).sum()


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("pack", [False, True])
def test_padded_packed_and_mixed_batches_equal_each_sample_alone(items, pack, ratio, positions):
    model = training_model(position_ids=positions).train()
    outputs = run(model, Collator(PAD, pack)(items), ratio)
    losses = [alone(model, item, ratio) for item in items]
    torch.testing.assert_close(outputs.language_loss, sum(losses), rtol=1e-5, atol=1e-4)
    if ratio > 0:
        scorer = list(model.model.vision_tower.scorer.parameters())
        gradients = torch.autograd.grad(outputs.language_loss, scorer)
        for gradient, expected in zip(gradients, torch.autograd.grad(sum(losses), scorer)):
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_losses_and_scorer_gradients_equal_the_naive_twin():
    model = lively_model().train().double()
    inputs = video_inputs((3,), side="right")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    del inputs["attention_mask"]
    ones, is_video = torch.ones_like(labels), torch.tensor([True])
    outputs = training_forward(model, **inputs, labels=labels, sample_idx=ones, is_video=is_video, prune_ratio=0.5)

    num_pruned = outputs.num_windows - outputs.num_kept
    language_loss, temporal_loss = naive.training_losses(
        model, inputs["input_ids"][0].tolist(), labels[0].tolist(), inputs["pixel_values_videos"].double(), num_pruned
    )
    torch.testing.assert_close(outputs.language_loss.double(), language_loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.temporal_loss.double(), temporal_loss, rtol=1e-4, atol=1e-5)
    weights = list(model.model.vision_tower.scorer.parameters())
    got = torch.autograd.grad(outputs.language_loss + outputs.temporal_loss, weights)
    for gradient, expected in zip(got, torch.autograd.grad(language_loss + temporal_loss, weights)):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_counts(items):
    model = training_model().train()
    outputs = run(model, Collator(PAD, pack=True)(items), 0.5)
    num_frames = NUM_FRAMES + 2
    assert outputs.num_tokens == sum(len(item["input_ids"]) for item in items)
    assert outputs.num_windows == num_frames * NUM_WINDOWS
    assert outputs.num_kept == 18 + 9
    count, score_sum, square_sum = outputs.score_sums.tolist()
    assert count == num_frames * NUM_WINDOWS and 0 < square_sum < score_sum < count


def test_an_answer_is_right_if_all_its_tokens_are(items):
    model = training_model().eval()
    batch = Collator(PAD, pack=True)(items)
    hidden = {}
    model.lm_head.register_forward_pre_hook(lambda module, args: hidden.update(states=args[0]))
    outputs = run(model, batch, 0.0)
    numbers = [batch["where"].index(item["where"]) + 1 for item in items]
    assert [outputs.answers_sample.tolist().count(number) for number in numbers] == [2, 1, 1, 1]
    # Labels play no part in what is likeliest after the tokens before them.
    likeliest = model.lm_head(hidden["states"]).argmax(-1)
    wrong = likeliest.clone()
    wrong[-1] = (wrong[-1] + 1) % 200
    for answers, expected in ((likeliest, [True] * 5), (wrong, [True] * 4 + [False])):
        labels = batch["labels"].masked_scatter(batch["labels"] != -100, answers)
        assert run(model, batch | {"labels": labels}, 0.0).answers_right.tolist() == expected


@pytest.mark.parametrize(("name", "ratio"), [("text", 0.5), ("image", 0.5), ("video", 0.0), ("video", 0.5)])
def test_every_trained_weight_takes_part_in_every_batch(items, name, ratio):
    model = training_model().train()
    freeze(model, [])
    item = items[["video", "", "image", "text"].index(name)]
    run(model, Collator(PAD)([item]), ratio).language_loss.backward()
    for weight_name, weight in model.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad, weight_name
        is_idle = group_of(weight_name) in ("vision_tower", "connector") and name == "text"
        assert not is_idle or not weight.grad.any()


def test_language_model_inputs_are_differentiable_or_not_in_all_batches_alike(items):
    """FSDP takes the gradients of a block in another order where its inputs have none."""
    model = training_model().train()
    for trained, expected in (("scorer", True), ("nothing", False)):
        for name, weight in model.named_parameters():
            weight.requires_grad_(group_of(name) == trained)
        seen = []
        hook = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].requires_grad)
        )
        for item in items:
            run(model, Collator(PAD)([item]), 0.5)
        hook.remove()
        assert seen == [expected] * len(items)


def test_the_zero_of_frozen_weights_is_a_plain_one():
    model = training_model()
    model.requires_grad_(False)
    zero = idle_zero(model)
    assert zero == 0 and not zero.requires_grad


def test_positions_and_mask_by_hand():
    sample_idx = torch.tensor([[1, 1, 1, 2, 2, 0]])
    assert positions_in_samples(sample_idx).tolist() == [[0, 1, 2, 0, 1, 0]]
    mask = packed_mask(sample_idx, torch.tensor([[1, 1, 0, 0, 1, 0]]))[0, 0].int().tolist()
    assert mask == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_packed_rows_need_an_attention_that_takes_a_mask(items):
    model = training_model()
    model.config.text_config._attn_implementation = "eager"
    run(model, Collator(PAD)(items[1:2]), 0.5)
    with pytest.raises(ValueError, match="sdpa"):
        run(model, Collator(PAD, pack=True)(items), 0.5)
