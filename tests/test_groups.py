import sys

import pytest
import torch
from finetuning.groups import GROUPS, add_lora, freeze, group_of, group_weights
from training_inputs import training_model


def trained(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.vision_tower.scorer.mlp.fc1.weight", "scorer"),
        ("base_model.model.model.vision_tower.scorer.modules_to_save.default.mlp.fc1.weight", "scorer"),
        ("module.model.vision_tower.layers.0.mlp.fc1.weight", "vision_tower"),
        ("model.vision_tower.positional_embedding", "vision_tower"),
        ("model.multi_modal_projector.image_pooling_2d.q_proj.bias", "connector"),
        ("model.language_model.embed_tokens.weight", "language_model"),
        ("lm_head.weight", "language_model"),
    ],
)
def test_groups_by_name(name, group):
    assert group_of(name) == group


@pytest.mark.parametrize("frozen", [[], ["scorer"], ["vision_tower", "connector", "language_model"]])
def test_frozen_groups_are_not_trained(frozen):
    model = training_model()
    freeze(model, frozen)
    assert {group_of(name) for name in trained(model)} == GROUPS.keys() - set(frozen)


def test_what_no_loss_reaches_is_not_trained():
    model = training_model(method="similarity")
    model.config.adapter_config.vision_feature_layer = [-3, 3]
    freeze(model, [])
    names = trained(model)
    layers = {int(name.split(".")[3]) for name in names if name.startswith("model.vision_tower.layers.")}
    assert layers == set(range(6))
    assert not any(group_of(name) == "scorer" for name in names)


def test_groups_that_do_not_exist_and_freezing_everything_are_refused():
    with pytest.raises(ValueError, match="can be frozen, got 'head'"):
        freeze(training_model(), ["scorer", "head"])
    with pytest.raises(ValueError, match="Nothing is left to train"):
        freeze(training_model(), list(GROUPS))


def test_weights_are_grouped_once_each_and_the_language_model_comes_first():
    model = training_model()
    freeze(model, ["connector"])
    decayed = [name for name, weight in model.named_parameters() if weight.dim() > 1]
    groups = group_weights(model, decayed)
    assert [group["group"] for group in groups] == ["language_model"] * 2 + ["vision_tower"] * 2 + ["scorer"] * 2
    weights = [weight for group in groups for weight in group["params"]]
    assert len(weights) == len(trained(model)) == len({id(weight) for weight in weights})
    assert all((weight.dim() > 1) == group["decays"] for group in groups for weight in group["params"])


def test_lora_trains_adapters_of_the_language_model_and_the_whole_scorer():
    model = training_model().to(torch.bfloat16)
    freeze(model, [])
    tuned = add_lora(model, rank=2, alpha=4, dropout=0.0)
    names = trained(tuned)
    adapters = {name for name in names if "lora_" in name}
    assert len(adapters) == 2 * 2 * 7  # layers, matrices, linear layers
    assert all("language_model" in name for name in adapters)
    scorer = [name for name, _ in model.model.vision_tower.scorer.named_parameters() if "modules_to_save" in name]
    assert names - adapters == {f"base_model.model.model.vision_tower.scorer.{name}" for name in scorer}
    assert {weight.dtype for weight in tuned.parameters() if weight.requires_grad} == {torch.float32}
    assert tuned.lm_head.weight.dtype == torch.bfloat16


def test_lora_leaves_a_frozen_scorer_alone():
    model = training_model()
    freeze(model, ["scorer"])
    assert all("lora_" in name for name in trained(add_lora(model, rank=2, alpha=4, dropout=0.0)))


def test_lora_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"modeling-stts\[lora\]"):
        add_lora(training_model(), rank=2, alpha=4, dropout=0.0)
