import logging
import math
import resource

import naive
import pytest
import torch
from finetuning.collator import Collator
from finetuning.encoding import ConversationDataset, Encoder
from finetuning.groups import add_lora, freeze
from finetuning.samples import read_samples
from finetuning.trainer import FinetuningArguments, FinetuningTrainer, last_good_checkpoint
from inputs import lively_model, video_inputs
from safetensors.torch import load_file
from training_inputs import training_model, training_processor, turns, write_mixed, write_rows, write_still

from modeling_stts.stts_selection import count_pruned_windows


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return write_mixed(tmp_path_factory.mktemp("mixed"))


def make_trainer(data, out, lora=False, pack=False, on_bad_video="fail", stts=None, **args):
    model, processor = training_model(**(stts or {})), training_processor()
    freeze(model, [])
    if lora:
        torch.manual_seed(0)
        model = add_lora(model, rank=2, alpha=4, dropout=0.0)
    dataset = ConversationDataset(read_samples(data), Encoder(processor, None), on_bad_video)
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "scorer_warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return FinetuningTrainer(
        model,
        FinetuningArguments(str(out), use_cpu=True, disable_tqdm=True, **(defaults | args)),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=processor,
        data_collator=Collator(processor.tokenizer.pad_token_id, pack),
    )


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer):
    return trainer.model.state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("lora", [False, True])
def test_a_training_goes_on_from_any_checkpoint_to_the_same_losses_and_weights(mixed, tmp_path, lora):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "lora": lora}
    # Another ratio each step, batches in another order each epoch of two, and two of them in each step.
    args |= {"random_prune_ratios": [0.0, 0.3, 0.8], "prune_warmup_steps": 3, "gradient_accumulation_steps": 2}
    args |= {"per_device_train_batch_size": 1}
    whole = make_trainer(mixed, tmp_path / "whole", **args)
    whole.train()
    for step in (2,) if lora else (1, 3):
        rest = make_trainer(mixed, tmp_path / f"rest-{step}", **args)
        rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name in ("loss", "language_loss", "temporal_loss", "grad_norm", "scorer_grad_norm", "prune_ratio"):
            assert logged(rest, name) == logged(whole, name), name
        assert same(weights(rest), weights(whole))


@pytest.mark.parametrize(("batch_size", "accumulation", "pack"), [(4, 1, False), (4, 1, True), (1, 4, False)])
def test_the_loss_is_the_same_in_one_batch_in_packed_rows_and_in_several(
    mixed, tmp_path, batch_size, accumulation, pack
):
    """All of a step's labels count alike, and all compared windows."""
    trainer = make_trainer(
        mixed,
        tmp_path,
        pack=pack,
        max_steps=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    reference = training_model().train()
    dataset = trainer.train_dataset
    sums, labels, errors, compared = 0, 0, 0, 0
    for i in range(len(dataset)):
        inputs = {name: value for name, value in dataset[i].items() if torch.is_tensor(value)}
        inputs |= {name: inputs[name][None] for name in ("input_ids", "labels", "mm_token_type_ids")}
        outputs = reference(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
        num_labels = (inputs["labels"][:, 1:] != -100).sum()
        num_compared = 9 * (inputs["video_grids"][0, 0] - 1) if "video_grids" in inputs else 0
        sums += num_labels * (outputs.loss - 0.5 * outputs.temporal_loss).item()
        errors += num_compared * outputs.temporal_loss.item()
        labels, compared = labels + num_labels, compared + num_compared
    trainer.train()
    assert logged(trainer, "language_loss")[0] == pytest.approx(float(sums / labels), rel=1e-4)
    assert logged(trainer, "temporal_loss")[0] == pytest.approx(float(errors / compared), rel=1e-4)
    assert logged(trainer)[0] == pytest.approx(float(sums / labels + 0.5 * errors / compared), rel=1e-4)


def test_scorer_gradients_of_a_step_equal_the_naive_twin(tmp_path):
    """Of a batch with videos of two lengths, through both parts of the loss that is trained."""
    model, twin, items = lively_model().train(), lively_model().train(), []
    language_loss, temporal_loss, num_labels, num_compared = 0, 0, 0, 0
    for number, num_frames in enumerate((3, 2)):
        inputs = video_inputs((num_frames,), side="right")
        inputs |= {name: inputs[name][0] for name in ("input_ids", "mm_token_type_ids")}
        del inputs["attention_mask"]
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[-2 - number :] = inputs["input_ids"][-2 - number :]
        items.append(inputs | {"labels": labels, "where": f"{number}", "skipped": {}})
        num_pruned = count_pruned_windows(num_frames, 81, 0.5)
        sum_over_labels, mean = naive.training_losses(
            twin, inputs["input_ids"].tolist(), labels.tolist(), inputs["pixel_values_videos"], num_pruned
        )
        language_loss, num_labels = language_loss + sum_over_labels, num_labels + 2 + number
        temporal_loss, num_compared = temporal_loss + mean * (num_frames - 1), num_compared + num_frames - 1
    loss = language_loss / num_labels + 0.5 * temporal_loss / num_compared
    expected = torch.autograd.grad(loss, list(twin.model.vision_tower.scorer.parameters()))

    args = FinetuningArguments(
        str(tmp_path),
        use_cpu=True,
        disable_tqdm=True,
        max_steps=1,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
    )
    trainer = FinetuningTrainer(model, args, train_dataset=items, data_collator=Collator(256))
    got, clip = [], trainer._clip_grad_norm
    trainer._clip_grad_norm = lambda model: (
        got.extend(weight.grad.clone() for weight in model.model.vision_tower.scorer.parameters()) or clip(model)
    )
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(loss.item(), rel=1e-4)
    assert len(got) == len(expected) and max(of_twin.norm() for of_twin in expected) > 0.1
    for gradient, of_twin in zip(got, expected):
        torch.testing.assert_close(gradient, of_twin, rtol=1e-3, atol=1e-5)


def test_activation_checkpointing_changes_nothing(mixed, tmp_path):
    plain = make_trainer(mixed, tmp_path / "plain", max_steps=2)
    plain.train()
    saving = make_trainer(mixed, tmp_path / "saving", max_steps=2, gradient_checkpointing=True)
    saving.train()
    assert logged(saving) == pytest.approx(logged(plain), rel=1e-5)


def test_half_precision_trains_float32_weights(mixed, tmp_path):
    trainer = make_trainer(mixed, tmp_path, max_steps=1, bf16=True)
    trainer.train()
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    exact = make_trainer(mixed, tmp_path, max_steps=1)
    exact.train()
    assert logged(trainer) != logged(exact)
    assert logged(trainer) == pytest.approx(logged(exact), rel=0.1)


def test_what_is_logged(mixed, tmp_path):
    rates = {"scorer_learning_rate": 1e-2, "vision_tower_learning_rate": 1e-4, "connector_learning_rate": 1e-5}
    trainer = make_trainer(mixed, tmp_path, per_device_train_batch_size=4, logging_steps=2, **rates)
    seen = []
    step = trainer.training_step
    trainer.training_step = lambda *args: (
        seen.append({group["group"]: group["lr"] for group in groups()}) or step(*args)
    )

    def groups():
        return trainer.optimizer.param_groups

    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["step"] == 2 and entry["prune_ratio"] == 0.5 and entry["kept_share"] == 0.5
    assert 0 < entry["score_mean"] < 1 and 0 < entry["score_std"] < 0.5 and entry["scorer_grad_norm"] > 0
    assert entry["loss"] == pytest.approx(entry["language_loss"] + 0.5 * entry["temporal_loss"], rel=1e-4)
    tokens = sum(len(trainer.train_dataset[i]["input_ids"]) for i in range(4))
    assert entry["tokens_per_second"] / entry["frames_per_second"] == pytest.approx(tokens / 6, rel=1e-4)
    assert seen[0]["scorer"] == 0 and seen[1]["scorer"] == pytest.approx(5e-3)
    assert seen[0]["language_model"] == 1e-3 and seen[0]["vision_tower"] == 1e-4 and seen[0]["connector"] == 1e-5


def test_the_scorers_gradient_norm_is_that_before_clipping(mixed, tmp_path):
    clipped = make_trainer(mixed, tmp_path, max_steps=1, max_grad_norm=1e-3)
    clipped.train()
    plain = make_trainer(mixed, tmp_path, max_steps=1)
    norms = []
    plain._clip_grad_norm = lambda model: (
        norms.append(torch.stack([w.grad.norm() for w in model.model.vision_tower.scorer.parameters()]).norm().item())
        or FinetuningTrainer._clip_grad_norm(plain, model)
    )
    plain.train()
    assert logged(clipped, "scorer_grad_norm") == pytest.approx(norms, rel=1e-3)


def test_a_training_that_is_not_finite_stops_and_names_its_samples(mixed, tmp_path):
    trainer = make_trainer(mixed, tmp_path, gradient_accumulation_steps=2)
    calls = []

    def poison(module, args, outputs):
        calls.append(1)
        if len(calls) == 6:  # the second batch of the third step
            outputs.language_loss = outputs.language_loss * math.nan

    trainer.model.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match="The gradient of step 3 is not finite") as error:
        trainer.train()
    assert str(error.value).count(f"{mixed}:") == 4
    assert f"loss nan: {mixed}:" in str(error.value)
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())


def test_skipped_videos_are_named_once_and_counted(mixed, tmp_path, caplog):
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    data = write_rows(tmp_path / "data.jsonl", [turns("a", "b", video="bad.mp4"), turns("c", "d")])
    trainer = make_trainer(data, tmp_path / "out", on_bad_video="skip", max_steps=2)
    logging.getLogger("transformers").propagate = True
    trainer.train()
    assert list(trainer.all_skipped()) == [f"{data}:1"]
    assert caplog.text.count(f"Skipped {data}:1: ") == 1
    with pytest.raises(ValueError, match="bad.mp4"):
        make_trainer(data, tmp_path / "out").train()


def test_accuracy_is_the_share_of_what_greedy_generation_gives(tmp_path):
    model, processor = training_model().eval(), training_processor()
    rows, answers = [], {}
    for number, ratio in enumerate([0.0, 0.8, 0.8, 0.8], start=1):
        write_still(tmp_path / f"{number}.mp4", 37 * number)
        rows.append(turns(f"Which of {number}?", "xy", video=f"{number}.mp4"))
        asked = read_samples(write_rows(tmp_path / "data.jsonl", rows))[-1]
        inputs = processor.apply_chat_template(
            asked.messages[:1], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        # What the model says at one ratio.
        output = model.generate(**inputs, max_new_tokens=2, do_sample=False, prune_ratio=ratio)
        answers[asked.where] = output[0, inputs["input_ids"].shape[1] :]
    trainer = make_trainer(tmp_path / "data.jsonl", tmp_path / "out", eval_prune_ratios=[0.0, 0.8])

    def put_answers_in(items):
        for item in items:
            answer, end = (item["labels"] != -100).nonzero()[:, 0].split([2, 1])
            item["labels"][end] = -100
            for name in ("input_ids", "labels"):
                item[name][answer] = answers[item["where"]]
        return Collator(256)(items)

    trainer.data_collator = put_answers_in
    metrics = trainer.evaluate()
    assert metrics.items() <= trainer.state.log_history[-1].items()
    assert metrics["eval_answers"] == 4
    assert metrics["eval_accuracy_0.8"] == 0.75 and metrics["eval_accuracy_0.0"] == 0.25


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_last_good_one(mixed, tmp_path):
    trainer = make_trainer(mixed, tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1)
    save, limits = trainer._save_optimizer_and_scheduler, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(folder):
        if trainer.state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        save(folder)

    trainer._save_optimizer_and_scheduler = fill_the_disk
    try:
        with pytest.raises(OSError, match=r"checkpoint-2 could not be written .* last good checkpoint is .*-1\."):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-1"]
    again = make_trainer(mixed, tmp_path, max_steps=3)
    again.train(resume_from_checkpoint=str(last_good_checkpoint(tmp_path)))
    assert len(logged(again)) == 3


def test_an_interrupted_checkpoint_is_no_good_one(tmp_path):
    assert last_good_checkpoint(tmp_path / "missing") is None
    for step, state in ((5, '{"global_step": 5}'), (40, '{"global_step": 40}'), (45, '{"global'), (50, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-40"


def test_arguments_that_cannot_work_are_refused(mixed, tmp_path):
    with pytest.raises(ValueError, match="`max_grad_norm` must be above 0, got 0"):
        make_trainer(mixed, tmp_path, max_grad_norm=0)
    for name in ("random_prune_ratios", "eval_prune_ratios"):
        with pytest.raises(ValueError, match="0 <= prune_ratio < 1, got 1.5"):
            make_trainer(mixed, tmp_path, **{name: [0.5, 1.5]})


def test_a_checkpoint_has_the_released_names(mixed, tmp_path):
    trainer = make_trainer(mixed, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    names = load_file(tmp_path / "checkpoint-1" / "model.safetensors").keys()
    assert any("temporal_token_scorer" in name for name in names)
