import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2Processor,
    Molmo2VideoProcessor,
)

import modeling_stts
from hub_upload.build import SCORER_PREFIX, build_hub_folder
from hub_upload.tiny import tiny_config, tiny_model, tiny_processor
from modeling_stts import Molmo2SttsForConditionalGeneration, Molmo2SttsProcessor


OTHER_FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def native_model():
    fields = tiny_config().to_dict()
    for name in ("model_type", "auto_map", "custom_pipelines", "stts_config"):
        fields.pop(name)
    model = Molmo2ForConditionalGeneration(Molmo2Config(**fields)).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    model.generation_config = GenerationConfig(
        eos_token_id=[258, 256], pad_token_id=256, do_sample=True, temperature=0.3
    )
    return model


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory):
    """A checkpoint saved by the native classes; its weights have the released names."""
    folder = tmp_path_factory.mktemp("native")
    native_model().save_pretrained(folder)
    parts = tiny_processor(tiny_config())
    video_processor = Molmo2VideoProcessor(
        size=parts.video_processor.size, patch_size=2, pooling_size=[3, 3], num_frames=5, max_fps=1
    )
    Molmo2Processor(
        image_processor=parts.image_processor,
        video_processor=video_processor,
        tokenizer=parts.tokenizer,
        chat_template="{# its own #}" + parts.chat_template,
        use_single_crop_start_token=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def built_from_native(native_folder, tmp_path_factory):
    return build_hub_folder(tmp_path_factory.mktemp("built") / "out", native_folder, prune_ratio=0)


@pytest.fixture
def native_copy(native_folder, tmp_path):
    return Path(shutil.copytree(native_folder, tmp_path / "source"))


@pytest.fixture(scope="module")
def video_inputs():
    processor = tiny_processor(tiny_config())
    video = torch.randint(0, 255, (4, 3, 54, 54), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
    return processor(text=text, videos=[video], do_sample_frames=False, return_tensors="pt")


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_folder_is_complete(tiny_folder):
    package = Path(modeling_stts.__file__).parent
    code = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert {path.name for path in tiny_folder.iterdir()} == code | OTHER_FILES
    assert all((tiny_folder / name).read_bytes() == (package / name).read_bytes() for name in code)


def test_everything_that_the_config_names_is_there(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    references = [*config["auto_map"].values(), config["custom_pipelines"]["video-text-to-text"]["impl"]]
    assert config["model_type"] == "molmo2_stts" and len(config["auto_map"]) == 6
    for reference in references:
        module, name = reference.split(".")
        assert f"class {name}(" in (tiny_folder / f"{module}.py").read_text()


def test_same_input_gives_same_bytes(tiny_folder, built_from_native, native_folder, tmp_path):
    torch.manual_seed(123)
    assert hashes(build_hub_folder(tmp_path / "a")) == hashes(tiny_folder)
    assert hashes(build_hub_folder(tmp_path / "b", native_folder, prune_ratio=0)) == hashes(built_from_native)


def test_native_checkpoint_at_ratio_zero_equals_native(built_from_native, video_inputs):
    ours = Molmo2SttsForConditionalGeneration.from_pretrained(built_from_native)
    assert torch.equal(logits(ours, video_inputs), logits(native_model(), video_inputs))


def test_weights_have_released_names_and_those_of_the_references_scorer(built_from_native, tiny_folder):
    of_tiny = load_file(tiny_folder / "model.safetensors").keys()
    assert sum("temporal_token_scorer" in name for name in of_tiny) == 14
    assert load_file(built_from_native / "model.safetensors").keys() == of_tiny


def test_weights_by_native_names(native_copy, built_from_native, tiny_folder, tmp_path):
    save_file(native_model().state_dict(), native_copy / "model.safetensors", {"format": "pt"})
    folder = build_hub_folder(tmp_path / "out", native_copy)
    assert load_file(folder / "model.safetensors").keys() == load_file(tiny_folder / "model.safetensors").keys()
    ours = Molmo2SttsForConditionalGeneration.from_pretrained(folder)
    other = Molmo2SttsForConditionalGeneration.from_pretrained(built_from_native).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in ours.state_dict().items())


def test_settings_of_a_native_checkpoint_are_kept(built_from_native):
    processor = Molmo2SttsProcessor.from_pretrained(built_from_native)
    assert type(processor.video_processor).__name__ == "Molmo2SttsVideoProcessor"
    assert (processor.video_processor.num_frames, processor.video_processor.max_fps) == (5, 1)
    assert processor.image_processor.max_crops == 2
    assert processor.use_single_crop_start_token is False
    assert processor.chat_template.startswith("{# its own #}")
    generation_config = GenerationConfig.from_pretrained(built_from_native)
    assert (generation_config.eos_token_id, generation_config.temperature) == ([258, 256], 0.3)


def test_fresh_scorer_is_announced_once(native_folder, tmp_path, caplog):
    build_hub_folder(tmp_path / "out", native_folder)
    messages = [record.getMessage() for record in caplog.records if "reshly initialised" in record.getMessage()]
    num_parameters = sum(name.startswith(SCORER_PREFIX) for name in tiny_model().state_dict())
    assert len(messages) == 1 and num_parameters > 0
    assert SCORER_PREFIX in messages[0] and f" {num_parameters} " in messages[0]


def test_files_as_released(native_copy, built_from_native, tmp_path):
    config = json.loads((native_copy / "config.json").read_text())
    config["vit_config"] = {**config.pop("vision_config"), "num_hidden_layers": 10}
    config["adapter_config"]["vit_layers"] = config["adapter_config"].pop("vision_feature_layer")
    config["auto_map"] = {"AutoConfig": "configuration_molmo2.Molmo2Config"}
    (native_copy / "config.json").write_text(json.dumps(config))
    settings = json.loads((native_copy / "processor_config.json").read_text())
    auto_map = {"AutoProcessor": "processing_molmo2.Molmo2Processor"}
    for kind, name in {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}.items():
        auto_class = f"Auto{kind.title()}Processor"
        own_map = auto_map | {auto_class: f"{kind}_processing_molmo2.Molmo2{kind.title()}Processor"}
        part = settings.pop(f"{kind}_processor")
        (native_copy / name).write_text(json.dumps({**part, "auto_map": own_map}))
    (native_copy / "processor_config.json").write_text(json.dumps({**settings, "auto_map": auto_map}))
    edit_json(native_copy / "tokenizer_config.json", auto_map=auto_map)
    assert hashes(build_hub_folder(tmp_path / "out", native_copy, prune_ratio=0)) == hashes(built_from_native)


def test_resaved_checkpoint_builds_again(tmp_path, caplog):
    model = tiny_model(weight_seed=7, method="similarity", prune_ratio=0.25)
    model.save_pretrained(tmp_path / "saved")
    tiny_processor(model.config).save_pretrained(tmp_path / "saved")
    out = build_hub_folder(tmp_path / "out", tmp_path / "saved", prune_ratio=0.75)
    again = Molmo2SttsForConditionalGeneration.from_pretrained(out)
    assert (again.config.stts_config.prune_ratio, again.config.stts_config.method) == (0.75, "similarity")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert "initialised" not in caplog.text


def test_building_from_a_hub_folder_changes_nothing(built_from_native, tmp_path):
    assert hashes(build_hub_folder(tmp_path / "out", built_from_native)) == hashes(built_from_native)


@pytest.mark.parametrize("from_tiny", [True, False])
def test_dtype(native_folder, tmp_path, from_tiny):
    out = build_hub_folder(tmp_path / "out", "tiny" if from_tiny else native_folder, dtype="bfloat16")
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_folder_can_be_read_by_others(tmp_path):
    (tmp_path / "plain").mkdir()
    out = build_hub_folder(tmp_path / "out")
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["empty folder", "file", "dangling link"])
def test_out_that_exists_is_left_alone(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "empty folder":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="out exists"):
        build_hub_folder(out)
    assert list(tmp_path.iterdir()) == [out]
    assert kind != "file" or out.read_text() == "mine"


def test_parent_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_parent"):
        build_hub_folder(tmp_path / "no_parent" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"prune_ratio": 1.0}, "prune_ratio.*1.0"),
        ({"prune_ratio": -0.1}, "prune_ratio.*-0.1"),
        ({"method": "magic"}, "method.*magic"),
        ({"dtype": "int8"}, "dtype.*int8"),
    ],
)
@pytest.mark.parametrize("from_tiny", [True, False])
def test_bad_arguments(native_folder, tmp_path, arguments, words, from_tiny):
    with pytest.raises(ValueError, match=words):
        build_hub_folder(tmp_path / "out", "tiny" if from_tiny else native_folder, **arguments)
    assert list(tmp_path.iterdir()) == []


def remove(name):
    return lambda folder: (folder / name).unlink()


BAD_SOURCES = {
    "no folder": (shutil.rmtree, "source is not an existing folder"),
    "no config": (remove("config.json"), "no config.json"),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not a model"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json is not a model"),
    "no model type": (lambda folder: (folder / "config.json").write_text("{}"), "config.json is not a model"),
    "other model type": (lambda f: edit_json(f / "config.json", model_type="llava"), "'llava'.*molmo2, molmo2_stts"),
    "wrong field": (lambda f: edit_json(f / "config.json", image_patch_id="five"), "config.json.*image_patch_id"),
    "no weights": (remove("model.safetensors"), "model.safetensors"),
    "truncated weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 5000),
        "weights of .* cannot be read",
    ),
    "missing key": (lambda f: edit_weights(f, lambda w: w.pop("lm_head.weight")), "misses.*1: lm_head.weight"),
    "unexpected key": (
        lambda f: edit_weights(f, lambda w: w.update(extra=torch.zeros(1))),
        "unexpected.*1: extra",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda w: w.update({"lm_head.weight": torch.zeros(2, 2)})),
        "wrongly shaped.*1: lm_head.weight",
    ),
    "no tokenizer": (remove("tokenizer_config.json"), "no tokenizer_config.json"),
    "no processor": (remove("processor_config.json"), "no processor files"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "processor of .*source cannot"),
    "no chat template": (remove("chat_template.jinja"), "no chat template"),
    "broken generation config": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        "generation_config.json",
    ),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_bad_source_leaves_nothing(native_copy, tmp_path, kind):
    damage, words = BAD_SOURCES[kind]
    damage(native_copy)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises((OSError, ValueError), match=words):
        build_hub_folder(work / "out", native_copy)
    assert list(work.iterdir()) == []


def test_many_wrong_keys_are_counted(native_copy, tmp_path):
    edit_weights(native_copy, lambda weights: weights.update({f"extra{i}": torch.zeros(1) for i in range(7)}))
    with pytest.raises(ValueError, match=r"7: extra0, extra1, extra2, extra3, extra4, \.\.\.$"):
        build_hub_folder(tmp_path / "out", native_copy)


def test_stts_checkpoint_without_its_scorer(tiny_folder, tmp_path):
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    edit_weights(source, lambda weights: [weights.pop(name) for name in list(weights) if "scorer" in name])
    with pytest.raises(ValueError, match="misses.*scorer"):
        build_hub_folder(tmp_path / "out", source)


def test_half_a_scorer(tiny_folder, tmp_path):
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    edit_json(source / "config.json", model_type="molmo2")
    edit_weights(source, lambda weights: [weights.pop(name) for name in list(weights) if "scorer.mlp" in name])
    with pytest.raises(ValueError, match="misses.*scorer.mlp"):
        build_hub_folder(tmp_path / "out", source)


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(Molmo2SttsProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        build_hub_folder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


TRAINING_FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"]
PRIVATE_FILES = [".env", "token", "train.log", "events.out.tfevents.1.host.2.0", "notes.txt"]


def test_only_what_is_on_the_allow_list_gets_in(tiny_folder, tmp_path):
    source = Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint-500"))
    for name in TRAINING_FILES + PRIVATE_FILES:
        (source / name).write_bytes(b"hf_secret")
    (source / "global_step500").mkdir()
    (source / "global_step500" / "zero_pp_rank_0_optim_states.pt").write_bytes(b"hf_secret")
    clean = build_hub_folder(tmp_path / "clean", tiny_folder)
    assert hashes(build_hub_folder(tmp_path / "out", source)) == hashes(clean)


def test_a_file_that_is_not_on_the_allow_list_is_named(tmp_path, monkeypatch):
    save = Molmo2SttsProcessor.save_pretrained

    def save_more(processor, folder):
        save(processor, folder)
        (Path(folder) / "cache.bin").write_bytes(b"")

    monkeypatch.setattr(Molmo2SttsProcessor, "save_pretrained", save_more)
    with pytest.raises(ValueError, match="cache.bin is not on the allow-list"):
        build_hub_folder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_sharded_checkpoint(tiny_folder, tmp_path):
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    (source / "model.safetensors").unlink()
    tiny_model().save_pretrained(source, max_shard_size="200KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 2
    whole = build_hub_folder(tmp_path / "whole", tiny_folder)
    assert hashes(build_hub_folder(tmp_path / "out", source)) == hashes(whole)
    split = build_hub_folder(tmp_path / "split", tiny_folder, max_shard_size="200KB")
    assert [path.name for path in sorted(split.glob("model-*.safetensors"))] == [path.name for path in shards]
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        build_hub_folder(tmp_path / "again", source)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "weight_map, words", [({"a": "../model.safetensors"}, "not the name of a file beside it"), ({}, "no weights")]
)
def test_bad_index(tiny_folder, tmp_path, weight_map, words):
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    (source / "model.safetensors").rename(tmp_path / "model.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=f"model.safetensors.index.json .*{words}"):
        build_hub_folder(tmp_path / "out", source)


def test_weights_that_are_not_finite(native_copy, tmp_path):
    edit_weights(native_copy, lambda weights: weights["lm_head.weight"].fill_(torch.nan))
    with pytest.raises(ValueError, match="lm_head.weight has values that are not finite"):
        build_hub_folder(tmp_path / "out", native_copy)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def adapter(tiny_folder, tmp_path):
    """A LoRA adapter for the tiny model that also holds a whole layer of the scorer, and the model that it makes."""
    import peft  # the other tests of this file need none

    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "fc1"], modules_to_save=["fc3"])
    tuned = peft.get_peft_model(Molmo2SttsForConditionalGeneration.from_pretrained(tiny_folder), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", tuned.eval()


def test_adapter_is_merged(tiny_folder, adapter, tmp_path, video_inputs):
    folder, tuned = adapter
    out = build_hub_folder(tmp_path / "out", tiny_folder, adapter=folder)
    merged = Molmo2SttsForConditionalGeneration.from_pretrained(out)
    torch.testing.assert_close(logits(merged, video_inputs), logits(tuned, video_inputs), rtol=1e-4, atol=1e-4)
    untuned = Molmo2SttsForConditionalGeneration.from_pretrained(tiny_folder)
    assert not torch.allclose(logits(untuned, video_inputs), logits(merged, video_inputs), atol=0.1)
    assert merged.state_dict().keys() == untuned.state_dict().keys()
    again = build_hub_folder(tmp_path / "again", tiny_folder, adapter=folder)
    assert hashes(again) == hashes(out)


def test_bad_adapters(tiny_folder, adapter, tmp_path):
    folder, _ = adapter
    weights = load_file(folder / "adapter_model.safetensors")
    name = sorted(weights)[0]
    for change, words in {
        "missing": "misses weights.*1: ",
        "unexpected": "unexpected weights.*1: other",
        "shape": "wrongly shaped weights.*1: ",
    }.items():
        broken = dict(weights)
        if change == "missing":
            del broken[name]
        elif change == "unexpected":
            broken["other"] = torch.zeros(1)
        else:
            broken[name] = torch.zeros(3)
        save_file(broken, folder / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=words):
            build_hub_folder(tmp_path / "out", tiny_folder, adapter=folder)
    edit_json(folder / "adapter_config.json", target_modules=["no_such_layer"])
    with pytest.raises(ValueError, match="does not fit the model"):
        build_hub_folder(tmp_path / "out", tiny_folder, adapter=folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors"):
        build_hub_folder(tmp_path / "out", tiny_folder, adapter=folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "adapter_config.json is not the configuration of an adapter"),
        ("[]", "adapter_config.json is not the configuration of an adapter"),
        ('{"peft_type": "NO_SUCH_TYPE"}', "is not the configuration of an adapter: .*NO_SUCH_TYPE"),
        ('{"peft_type": "LORA", "r": "two"}', "adapter does not fit the model"),
    ],
)
def test_bad_configurations_of_adapters(tiny_folder, adapter, tmp_path, content, words):
    folder, _ = adapter
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        build_hub_folder(tmp_path / "out", tiny_folder, adapter=folder)


def test_peft_is_asked_for_only_where_it_is_needed(tiny_folder, adapter, tmp_path, monkeypatch):
    folder, _ = adapter
    monkeypatch.setitem(sys.modules, "peft", None)
    build_hub_folder(tmp_path / "out", tiny_folder)
    with pytest.raises(ValueError, match="needs peft: pip install"):
        build_hub_folder(tmp_path / "merged", tiny_folder, adapter=folder)
