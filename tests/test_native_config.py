from pathlib import Path

import pytest
from native_checkpoint import native_config

from hub_upload.native_config import Section, apply_preprocessing, convert_config, is_pruned, read_native_config
from hub_upload.tiny import tiny_config, tiny_processor


def model_section(llm=(), vit=(), **backbone):
    content = native_config(**dict(vit))["model"]
    content["llm"].update(llm)
    content["vision_backbone"].update(backbone)
    return Section(Path("config.yaml"), "model", content)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_config())


def convert(processor, max_position_embeddings=None, **changes):
    return convert_config(model_section(**changes), processor.tokenizer, max_position_embeddings)


def test_a_section_names_what_is_missing():
    section = Section(Path("c.yaml"), "model", {"a": 1, "b": None, "c": {"d": 2}})
    assert (section["a"], section.get("b", 7), section.section("c")["d"]) == (1, 7, 2)
    for place, name in ((section, "b"), (section.section("c"), "c.e")):
        with pytest.raises(ValueError, match=rf"c.yaml: `model.{name}` is missing"):
            place[name[-1]]
    with pytest.raises(ValueError, match="`model.a` is missing or not a section"):
        section.section("a")
    section.check("x", True)
    with pytest.raises(ValueError, match="`model.a` must be 2 to be converted, got 1"):
        section.check("a", 2)


def test_files_that_are_no_configuration(tmp_path):
    path = tmp_path / "config.yaml"
    for text, words in {"a: [": "is not YAML", "[1]": "`model` is missing", "model: 3": "`model` is missing"}.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_native_config(path)


def test_layers_after_the_last_used_one_are_not_built(processor):
    config = convert(processor)
    assert config.vision_config.num_hidden_layers == 25 and config.adapter_config.vision_feature_layer == [24, 18]
    assert convert(processor, vit_layers=[7, -20]).vision_config.num_hidden_layers == 8


def test_sizes_that_follow_from_others(processor):
    text = convert(processor, llm={"n_kv_heads": None, "head_dim": None, "mlp_hidden_size": None}).text_config
    assert (text.num_key_value_heads, text.head_dim, text.intermediate_size) == (4, 8, 64)
    text = convert(processor, llm={"embedding_size": None, "max_position_embeddings": 99}).text_config
    assert (text.vocab_size, text.max_position_embeddings) == (250, 99)
    assert convert(processor, max_position_embeddings=36864).text_config.max_position_embeddings == 36864


def test_scaled_rope(processor):
    scaled = {
        "rope_type": "yarn",
        "rope_factor": 8.0,
        "rope_original_max_position_embeddings": 512,
        "rope_beta_fast": 32,
        "rope_beta_slow": 1,
        "rope_attention_factor": 1.2,
        "rope_mscale": None,
        "n_layers": 4,
        "full_attention_layers": [3],
    }
    text = convert(processor, llm=scaled).text_config
    assert text.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
        "attention_factor": 1.2,
    }
    assert text.rope_scaling_layers == [3]
    others = convert(processor, llm={**scaled, "sliding_attention_rope_scaling": True}).text_config
    assert others.rope_scaling_layers == [0, 1, 2]


def test_settings_of_pruning(processor):
    assert is_pruned(model_section()) and not is_pruned(model_section(vit={"prune": False}))
    stts = convert(processor, vit={"prune": False}).stts_config
    assert (stts.prune_ratio, stts.refill) == (0.5, False)
    stts = convert(processor, vit={"prune_at": 7, "topk": 0.7}).stts_config
    assert (stts.prune_ratio, stts.score_after_layer, stts.refill, stts.prune_from_frame) == (0.7, 7, True, 1)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"llm": {"activation_type": "gelu"}}, "llm.activation_type` must be 'swiglu'"),
        ({"llm": {"attention_layer_norm": False}}, "attention_layer_norm` must be True"),
        ({"pooling_attention_mask": False}, "pooling_attention_mask` must be True"),
        ({"image_projector": "linear"}, "image_projector` must be 'mlp'"),
        ({"vit": {"merge": True}}, "vit.merge` must be False"),
        ({"vit": {"pruning_in_scorer": False}}, "pruning_in_scorer` must be True"),
    ],
)
def test_what_cannot_be_converted(processor, changes, words):
    with pytest.raises(ValueError, match=words):
        convert(processor, **changes)


def test_a_tokenizer_without_the_tokens(processor):
    tokenizer = type(processor.tokenizer)(tokenizer_object=processor.tokenizer.backend_tokenizer)
    tokenizer.convert_tokens_to_ids = lambda token: None
    with pytest.raises(ValueError, match="has no token '<im_start>'"):
        convert_config(model_section(), tokenizer, None)


def test_preprocessing():
    own = tiny_processor(tiny_config())
    section = model_section()
    section.fields["mm_preprocessor"]["video"].update(max_frames=128, max_fps=1)
    apply_preprocessing(section, own)
    assert (own.video_processor.num_frames, own.video_processor.max_fps) == (128, 1)
    assert own.video_processor.pooling_size == [3, 3] and own.image_processor.pooling_size == [2, 2]
    assert own.use_frame_special_tokens is True
    section.fields["mm_preprocessor"]["video"]["time_mode"] = "other"
    with pytest.raises(ValueError, match="time_mode` must be 'per-frame-compact'"):
        apply_preprocessing(section, own)
