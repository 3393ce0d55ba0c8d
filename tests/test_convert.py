import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from native_checkpoint import NUM_DECLARED_LAYERS, native_config, native_weights, reference_model, save_native
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hub_upload.build import build_hub_folder
from hub_upload.convert import SPLIT_AT_LOAD, convert, to_released_name
from hub_upload.folder import PACKAGE, list_files
from hub_upload.tiny import tiny_model, tiny_processor
from modeling_stts import Molmo2SttsForConditionalGeneration, Molmo2SttsProcessor
from modeling_stts.stts_release import code_file_hashes


@pytest.fixture(scope="module")
def model():
    return reference_model()


@pytest.fixture(scope="module")
def native(model, tmp_path_factory):
    """A native checkpoint. Read only."""
    return save_native(tmp_path_factory.mktemp("native") / "step100", model)


@pytest.fixture(scope="module")
def converted(native, tiny_folder, tmp_path_factory):
    return convert(tmp_path_factory.mktemp("converted") / "out", native, processor=tiny_folder)


@pytest.fixture
def copy(native, tmp_path):
    return Path(shutil.copytree(native, tmp_path / "source"))


def load(folder):
    model, info = Molmo2SttsForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_equal_weights(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def count(conversion):
    actions = [row.action for row in conversion.rows]
    return {action: actions.count(action) for action in actions}


def test_a_native_checkpoint_gives_what_the_model_gives(model, converted):
    loaded = load(converted.folder)
    assert_equal_weights(loaded, model)
    processor = Molmo2SttsProcessor.from_pretrained(converted.folder)
    video = torch.randint(0, 255, (2, 3, 54, 54), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
    inputs = processor(text=text, videos=[video], do_sample_frames=False, return_tensors="pt")
    with torch.no_grad():
        for ratio in (None, 0.0):
            assert torch.equal(loaded(**inputs, prune_ratio=ratio).logits, model(**inputs, prune_ratio=ratio).logits)


def test_settings_of_a_native_checkpoint(model, converted):
    config, expected = load(converted.folder).config, model.config
    for part in ("vision_config", "adapter_config", "stts_config"):
        ours, theirs = getattr(config, part).to_dict(), getattr(expected, part).to_dict()
        assert {**ours, "dtype": None} == {**theirs, "dtype": None}, part
    assert config.text_config.max_position_embeddings == 4096
    assert config.image_patch_id == expected.image_patch_id
    assert config.frame_end_token_id == expected.frame_end_token_id
    processor = Molmo2SttsProcessor.from_pretrained(converted.folder)
    assert (processor.video_processor.num_frames, processor.video_processor.max_fps) == (6, 2)
    assert processor.image_processor.max_crops == 3
    settings = json.loads((converted.folder / "generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"]) == (258, 256)


def test_the_folder_is_complete(converted):
    names = {path.name for path in list_files(converted.folder)}
    assert code_file_hashes(PACKAGE).keys() < names
    assert code_file_hashes(converted.folder) == code_file_hashes(PACKAGE)
    assert "model.safetensors" in names and "model.pt" not in names


def test_the_table_names_every_tensor_once(model, converted):
    assert {row.source for row in converted.rows} == native_weights(model).keys()
    assert {row.target for row in converted.rows} == load_file(converted.folder / "model.safetensors").keys()
    assert count(converted) == {"joined": 2, "split": 4, "renamed": 442}
    text = converted.to_text()
    assert text.endswith("2 joined, 4 split, 442 renamed")
    assert "[64, 32] float32, into q_proj, k_proj, v_proj when loaded" in text


def test_split_tensors_are_those_of_transformers():
    converters = [rule for rule in get_checkpoint_conversion_mapping("Molmo2TextModel") if hasattr(rule, "operations")]
    split = {rule.source_patterns[0]: rule.target_patterns for rule in converters if len(rule.target_patterns) > 1}
    named = {
        source.removesuffix(".weight").rpartition(".")[2]: tuple(
            target.removesuffix(".weight").rpartition(".")[2] for target in targets
        )
        for source, targets in split.items()
    }
    assert named == SPLIT_AT_LOAD


@pytest.mark.parametrize(
    "name, released",
    [
        ("transformer.ff_out.weight", "lm_head.weight"),
        ("transformer.blocks.11.ff_out.weight", "model.transformer.blocks.11.mlp.ff_out.weight"),
        ("transformer.blocks.0.att_proj.bias", "model.transformer.blocks.0.self_attn.att_proj.bias"),
        ("transformer.blocks.0.attn_norm.weight", "model.transformer.blocks.0.attn_norm.weight"),
        ("vision_backbone.image_pooling_2d.wq.bias", "model.vision_backbone.image_pooling_2d.wq.bias"),
    ],
)
def test_names(name, released):
    assert to_released_name(name) == released


def test_declared_layers_that_are_not_used_are_left_over(model, tiny_folder, tmp_path):
    source = save_native(tmp_path / "source", model, num_layers=NUM_DECLARED_LAYERS)
    conversion = convert(tmp_path / "out", source, processor=tiny_folder)
    left = [row.source for row in conversion.rows if row.action == "left over"]
    assert len(left) == 32 and all(".resblocks.25." in name or ".resblocks.26." in name for name in left)
    assert_equal_weights(load(conversion.folder), model)


def save_in_parts(weights, folder):
    names = list(weights)
    for i in range(3):
        save_file({name: weights[name].contiguous() for name in names[i::3]}, folder / f"model-{i}.safetensors")


def save_distributed(weights, folder):
    state = {"model": weights, "optim": {"state.step": torch.zeros(1)}}
    dcp.save(state, checkpoint_id=folder / "model_and_optim", no_dist=True)


@pytest.mark.parametrize("save", [save_in_parts, save_distributed])
def test_other_formats_and_shards(model, copy, tiny_folder, tmp_path, save):
    (copy / "model.pt").unlink()
    save(native_weights(model), copy)
    conversion = convert(tmp_path / "out", copy, processor=tiny_folder, max_shard_size=300_000)
    sizes = [path.stat().st_size for path in conversion.folder.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 330_000
    assert_equal_weights(load(conversion.folder), model)
    left = [row for row in conversion.rows if row.action == "left over"]
    assert [row.source for row in left] == (["optim.state.step"] if save is save_distributed else [])


def test_tied_embeddings_are_copied(model, copy, tiny_folder, tmp_path):
    weights = native_weights(model)
    del weights["transformer.ff_out.weight"]
    torch.save(weights, copy / "model.pt")
    config = native_config()
    config["model"]["llm"]["weight_tying"] = True
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    conversion = convert(tmp_path / "out", copy, processor=tiny_folder)
    assert count(conversion)["copied"] == 1
    loaded = load(conversion.folder)
    assert torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight[:259])


def test_tensors_that_share_memory_or_are_not_contiguous(model, copy, tiny_folder, tmp_path):
    norms = [f"transformer.blocks.{i}.attn_norm.weight" for i in range(2)]
    weights = native_weights(model)
    output = weights["transformer.blocks.0.attn_out.weight"]
    weights |= {norms[1]: weights[norms[0]], "transformer.blocks.0.attn_out.weight": output.t().contiguous().t()}
    torch.save(weights, copy / "model.pt")
    loaded = load(convert(tmp_path / "out", copy, processor=tiny_folder).folder).state_dict()
    first, second = (loaded[f"model.language_model.layers.{i}.input_layernorm.weight"] for i in range(2))
    assert torch.equal(first, second)
    assert torch.equal(loaded["model.language_model.layers.0.self_attn.o_proj.weight"], output)


def test_values_that_are_too_large_for_the_type(copy, tiny_folder, tmp_path):
    edit_weights(copy, lambda weights: weights["transformer.ln_f.weight"].fill_(1e6))
    with pytest.raises(ValueError, match="transformer.ln_f.weight has values that are not finite .* as float16"):
        convert(tmp_path / "out", copy, processor=tiny_folder, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_native_checkpoint_without_scorer_gets_a_new_one(model, copy, tiny_folder, tmp_path):
    weights = {name: tensor for name, tensor in native_weights(model).items() if "temporal_token_scorer" not in name}
    torch.save(weights, copy / "model.pt")
    with pytest.raises(ValueError, match=r"misses weights.*14: .*temporal_token_scorer"):
        convert(tmp_path / "out", copy, processor=tiny_folder)
    (copy / "config.yaml").write_text(yaml.safe_dump(native_config(prune=False)))
    conversion = convert(tmp_path / "out", copy, processor=tiny_folder, prune_ratio=0.25, max_position_embeddings=777)
    assert count(conversion)["initialised"] == 14
    config = load(conversion.folder).config
    assert (config.stts_config.prune_ratio, config.stts_config.refill) == (0.25, False)
    assert config.text_config.max_position_embeddings == 777


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released Molmo2 checkpoint: no scorer, and its own names."""
    folder = tmp_path_factory.mktemp("released") / "molmo2"
    model = tiny_model(weight_seed=4)
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if "temporal_token_scorer" not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "molmo2"}))
    return folder


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_released_checkpoint_gives_what_build_gives(released, tmp_path, dtype):
    conversion = convert(tmp_path / "converted", released, prune_ratio=0.6, dtype=dtype)
    built = build_hub_folder(tmp_path / "built", released, prune_ratio=0.6, dtype=dtype)
    assert count(conversion)["initialised"] == 14 and "renamed" not in count(conversion)
    assert_equal_weights(load(conversion.folder), load(built))
    for path in list_files(built):
        if path.name != "model.safetensors":
            assert path.read_bytes() == (conversion.folder / path.name).read_bytes(), path.name


def test_fields_as_released_with_more_layers_than_weights(released, tmp_path):
    source = Path(shutil.copytree(released, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config["vit_config"] = {**config.pop("vision_config"), "num_hidden_layers": 10}
    config["adapter_config"]["vit_layers"] = [-3, -5]
    del config["adapter_config"]["vision_feature_layer"]
    (source / "config.json").write_text(json.dumps(config))
    conversion = convert(tmp_path / "out", source)
    loaded = load(conversion.folder)
    assert loaded.config.vision_config.num_hidden_layers == 8
    assert loaded.config.adapter_config.vision_feature_layer == [7, 5]
    assert_equal_weights(loaded, load(build_hub_folder(tmp_path / "built", released)))


def test_the_same_input_gives_the_same_bytes(native, converted, tiny_folder, tmp_path):
    again = convert(tmp_path / "again", native, processor=tiny_folder).folder
    assert all(path.read_bytes() == (again / path.name).read_bytes() for path in list_files(converted.folder))


def edit_weights(folder, edit):
    weights = torch.load(folder / "model.pt")
    edit(weights)
    torch.save(weights, folder / "model.pt")


def edit_config(folder, **changes):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in changes.items():
        *sections, field = name.split("__")
        place = config["model"]
        for section in sections:
            place = place[section]
        place[field] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def spoil(weights):
    weights["transformer.blocks.1.attn_out.weight"][0, 0] = torch.inf


BAD_SOURCES = {
    "no weights": (lambda folder: (folder / "model.pt").unlink(), "has no weights"),
    "truncated": (lambda folder: os.truncate(folder / "model.pt", 5000), "model.pt is not a whole file"),
    "missing": (
        lambda folder: edit_weights(folder, lambda weights: weights.pop("transformer.ln_f.weight")),
        "misses weights.*1: model.transformer.ln_f.weight",
    ),
    "unknown": (
        lambda folder: edit_weights(folder, lambda weights: weights.update(extra=torch.zeros(1))),
        "unexpected weights.*1: model.extra",
    ),
    "shape": (
        lambda folder: edit_weights(
            folder, lambda weights: weights.update({"transformer.ln_f.weight": torch.zeros(3)})
        ),
        "wrongly shaped.*1: model.transformer.ln_f.weight",
    ),
    "not finite": (lambda folder: edit_weights(folder, spoil), "transformer.blocks.1.attn_out.weight has values that"),
    "a tensor twice": (
        lambda folder: torch.save({"transformer.ln_f.weight": torch.zeros(32)}, folder / "model-2.pt"),
        "model.transformer.ln_f.weight is in two files: .*model-2.pt and .*model.pt",
    ),
    "no YAML": (lambda folder: (folder / "config.yaml").write_text("a: ["), "config.yaml is not YAML"),
    "no model": (lambda folder: (folder / "config.yaml").write_text("a: 1"), "`model` is missing"),
    "missing field": (lambda folder: edit_config(folder, llm__d_model=None), "`model.llm.d_model` is missing"),
    "other ViT": (
        lambda folder: edit_config(folder, vision_backbone__vit__image_model_type="openai"),
        "`model.vision_backbone.vit.image_model_type` must be 'siglip' to be converted, got 'openai'",
    ),
    "other method": (
        lambda folder: edit_config(folder, vision_backbone__vit__prune_method="easy"),
        "prune_method` must be 'scorer' to be converted, got 'easy'",
    ),
    "several rates": (
        lambda folder: edit_config(folder, mm_preprocessor__video__max_fps=[1, 2]),
        "max_fps` must be one",
    ),
    "bad ratio": (lambda folder: edit_config(folder, vision_backbone__vit__topk=1.0), "prune_ratio.*1.0"),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_bad_source_leaves_nothing(copy, tiny_folder, tmp_path, kind):
    damage, words = BAD_SOURCES[kind]
    damage(copy)
    (tmp_path / "work").mkdir()
    with pytest.raises((OSError, ValueError), match=words):
        convert(tmp_path / "work" / "out", copy, processor=tiny_folder)
    assert list((tmp_path / "work").iterdir()) == []


def test_bad_arguments(native, tiny_folder, released, tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer: `processor` must be"):
        convert(tmp_path / "out", native)
    with pytest.raises(ValueError, match="dtype.*'int8'"):
        convert(tmp_path / "out", native, processor=tiny_folder, dtype="int8")
    with pytest.raises(FileExistsError, match="exists"):
        convert(tmp_path, native, processor=tiny_folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "out", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="prune_ratio.*1.5"):
        convert(tmp_path / "out", released, prune_ratio=1.5)
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import sys, threading
from hub_upload.convert import convert

def anonymous_memory():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous_memory())

out, processor, size, small, *sources = sys.argv[1:]
convert(out, small, processor=processor)  # what is needed once
before = anonymous_memory()
for i, source in enumerate(sources):
    peak, done = 0, threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    convert(out + str(i), source, processor=processor, dtype="float16", max_shard_size=int(size))
    done.set()
    thread.join()
    print(peak - before)
"""
SHARD_SIZE = 32_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_memory_stays_below_two_shards(native, tiny_folder, tmp_path):
    wide = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1024, "num_hidden_layers": 40}
    config = native_config()
    config["model"]["llm"].update(d_model=256, head_dim=64, mlp_hidden_size=2048, n_layers=40)
    parts = save_native(tmp_path / "parts", reference_model(**wide), config)
    whole = Path(shutil.copytree(parts, tmp_path / "whole"))
    (parts / "model.pt").unlink()
    save_in_parts(torch.load(whole / "model.pt"), parts)
    sources = [str(parts), str(whole)]
    command = [sys.executable, "-c", MEASURE, tmp_path / "out", tiny_folder, str(SHARD_SIZE), native, *sources]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (whole / "model.pt").stat().st_size > 4 * SHARD_SIZE
    for i, peak in enumerate(map(int, done.stdout.split())):
        assert 0 < peak < 2 * SHARD_SIZE, peak
        assert len(list((tmp_path / f"out{i}").glob("*.safetensors"))) > 2
    assert i == 1
