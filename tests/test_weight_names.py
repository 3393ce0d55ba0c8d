"""Checkpoints by other names: released Molmo2's, the reference's scorer, and native ones."""

import pytest
import torch
from inputs import lively_model
from safetensors.torch import load_file, save_file
from test_modeling_molmo2_stts import native_twin

from modeling_stts import Molmo2SttsConfig, Molmo2SttsForConditionalGeneration, Molmo2SttsModel


ROPE = {"rope_type": "default", "rope_theta": 1e4}
REFERENCE_SCORER = "vision_backbone.image_vit.transformer.temporal_token_scorer."


@pytest.fixture(scope="module")
def model():
    return lively_model()


def load(folder, model_class=Molmo2SttsForConditionalGeneration):
    loaded, info = model_class.from_pretrained(folder, output_loading_info=True)
    return loaded, {name: set(keys) for name, keys in info.items() if keys}


def assert_equal_weights(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_saving_writes_released_and_reference_names_that_load_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert f"model.{REFERENCE_SCORER}patch_token_pooler.wq.weight" in names
    assert f"model.{REFERENCE_SCORER}mlp.w3.bias" in names
    assert "model.vision_backbone.image_vit.transformer.resblocks.0.attention.wq.weight" in names
    assert {"model.transformer.wte.embedding", "model.transformer.blocks.0.self_attn.att_proj.weight"} <= names
    assert not any("vision_tower" in name or "scorer.window_pooler" in name for name in names)
    loaded, problems = load(tmp_path)
    assert problems == {}
    assert_equal_weights(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    again, problems = load(tmp_path / "again")
    assert problems == {}
    assert_equal_weights(again, model)


def test_names_of_this_package_load_too(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, problems = load(tmp_path)
    assert problems == {}
    assert_equal_weights(loaded, model)


@pytest.mark.parametrize("naming", ["released", "native"])
def test_a_molmo2_checkpoint_misses_the_scorer_and_nothing_else(model, tmp_path, naming):
    native = native_twin(model)
    if naming == "released":
        native.save_pretrained(tmp_path)
    else:
        native.config.save_pretrained(tmp_path)
        native.generation_config.save_pretrained(tmp_path)
        save_file(native.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, problems = load(tmp_path)
    scorer = {name for name in model.state_dict() if ".scorer." in name}
    assert problems == {"missing_keys": scorer}
    ours, theirs = loaded.state_dict(), native.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_missing_scorer_is_announced_by_name(model, tmp_path, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    native_twin(model).save_pretrained(tmp_path)
    load(tmp_path)
    logging.disable_propagation()
    assert "vision_tower.scorer" in caplog.text and "MISSING" in caplog.text


def test_a_fresh_scorer_has_the_references_spread():
    config = Molmo2SttsConfig(
        vision_config={"num_hidden_layers": 8, "hidden_size": 256, "head_dim": 16, "intermediate_size": 512},
        adapter_config={"vision_feature_layer": [7, 5], "hidden_size": 256, "head_dim": 16, "text_hidden_size": 32},
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 8, "rope_parameters": ROPE},
    )
    scorer = Molmo2SttsModel(config).vision_tower.scorer
    assert scorer.window_pooler.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for linear in (scorer.mlp.fc1, scorer.mlp.fc2, scorer.mlp.fc3):
        assert linear.weight.std().item() == pytest.approx(linear.in_features**-0.5, rel=0.15)
        assert not linear.bias.any()


def test_the_base_model_loads_from_a_full_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, problems = load(tmp_path, model_class=Molmo2SttsModel)
    assert set(problems) <= {"unexpected_keys"} and problems.get("unexpected_keys", set()) <= {"lm_head.weight"}
    assert_equal_weights(loaded, model.model)


def test_contradictions_given_at_load_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`score_after_layer`=6 leaves no block to prune in"):
        Molmo2SttsForConditionalGeneration.from_pretrained(tmp_path, stts_config={"score_after_layer": 6})
