import json

import pytest
from transformers import Molmo2Config

from modeling_stts import Molmo2SttsConfig


def test_round_trip_through_a_folder(tmp_path):
    config = Molmo2SttsConfig(stts_config={"prune_ratio": 0.3, "method": "similarity"}, image_patch_id=7)
    config.save_pretrained(tmp_path)
    loaded = Molmo2SttsConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.stts_config.prune_ratio, loaded.stts_config.method) == (0.3, "similarity")


def test_saved_configuration_names_this_packages_files(tmp_path):
    Molmo2SttsConfig(auto_map={"AutoConfig": "org/name--elsewhere.Config"}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "molmo2_stts"
    assert set(saved["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoProcessor",
        "AutoVideoProcessor",
    }
    assert saved["auto_map"]["AutoConfig"] == "configuration_molmo2_stts.Molmo2SttsConfig"
    assert saved["custom_pipelines"]["video-text-to-text"]["impl"] == "pipeline_stts.VideoTextToTextPipeline"


def test_score_layer_must_fit_the_vit():
    with pytest.raises(ValueError, match="`score_after_layer`=6 leaves no block to prune in"):
        Molmo2SttsConfig(vision_config={"num_hidden_layers": 8}, stts_config={"score_after_layer": 6})


def test_settings_of_native_molmo2_are_kept():
    native = Molmo2Config(text_config={"num_hidden_layers": 5}, image_patch_id=11)
    fields = {name: value for name, value in native.to_dict().items() if name != "model_type"}
    config = Molmo2SttsConfig(**fields)
    assert (config.text_config.num_hidden_layers, config.image_patch_id) == (5, 11)
    assert config.stts_config.prune_ratio == 0.5


def test_attention_dropout_of_the_vit_is_refused():
    with pytest.raises(ValueError, match="`vision_config.attention_dropout` must be 0, got 0.1"):
        Molmo2SttsConfig(vision_config={"attention_dropout": 0.1})


def test_values_that_were_spoilt_later_are_not_saved(tmp_path):
    config = Molmo2SttsConfig()
    config.stts_config.prune_ratio = 1.5
    with pytest.raises(Exception, match="0 <= prune_ratio < 1, got 1.5"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_the_type_of_a_molmo2_checkpoint_is_not_taken_over():
    assert Molmo2SttsConfig.from_dict({"model_type": "molmo2"}).model_type == "molmo2_stts"
