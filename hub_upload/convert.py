"""Converts the reference's native checkpoints and released Molmo2 checkpoints to hub folders, shard by shard."""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from modeling_stts import Molmo2SttsConfig, Molmo2SttsForConditionalGeneration, Molmo2SttsProcessor

from .build import (
    DTYPES,
    MAX_SHARD_SIZE,
    SCORER_PREFIX,
    SCORER_SEED,
    check_keys,
    finish_folder,
    load_config,
    load_processor,
    model_type,
)
from .folder import CODE_FILES, PACKAGE
from .native_config import CONFIG_FILE, apply_preprocessing, convert_config, is_pruned, read_native_config
from .new_folder import check_out, new_folder
from .weight_files import TensorSpec, WeightFile, is_finite, open_weights


SHARD_PATTERN = "model{suffix}.safetensors"
SCORER = "model.vision_backbone.image_vit.transformer.temporal_token_scorer."
EMBEDDING, NEW_EMBEDDING = "model.transformer.wte.embedding", "model.transformer.wte.new_embedding"
LM_HEAD = "lm_head.weight"
VIT_BLOCK = re.compile(r"model\.vision_backbone\.image_vit\.transformer\.resblocks\.(\d+)\.")
LLM_BLOCK = re.compile(r"transformer\.blocks\.(\d+)\.(\w+)\.")
PARTS_OF_BLOCK = {
    **dict.fromkeys(("att_proj", "attn_out", "q_norm", "k_norm"), "self_attn."),
    **dict.fromkeys(("ff_proj", "ff_out"), "mlp."),
}
# What fused tensors become when they are loaded, by the end of their module's name.
SPLIT_AT_LOAD = {"att_proj": ("q_proj", "k_proj", "v_proj"), "ff_proj": ("up_proj", "gate_proj")}


class Row(NamedTuple):
    """
    What became of a tensor.

    action (`str`): "kept", "renamed", "split" (kept fused in the file, split when loaded), "joined" (with another one,
        when loaded), "copied", "initialised" or "left over".
    source (`str`): name in the checkpoint; empty where there is none.
    target (`str`): name in the hub folder; empty where there is none.
    note (`str`): shape, and why or into what.
    """

    action: str
    source: str
    target: str
    note: str


class Conversion(NamedTuple):
    """`folder` (`Path`): the hub folder. `rows` (`list[Row]`): one for each tensor of either side."""

    folder: Path
    rows: list[Row]

    def to_text(self) -> str:
        """The table as lines for people, with a count of each action at the end."""
        widths = [max(len(row[column]) for row in self.rows) for column in range(3)]
        lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, [*widths, 0])).rstrip() for row in self.rows]
        counts = Counter(row.action for row in self.rows)
        return "\n".join([*lines, ", ".join(f"{count} {action}" for action, count in counts.items())])


class _Piece(NamedTuple):
    """Where a tensor of the hub folder comes from: a file and a name in it, or memory."""

    spec: TensorSpec
    file: WeightFile | None = None
    source: str = ""
    tensor: torch.Tensor | None = None


def convert(
    out: str | os.PathLike,
    source: str | os.PathLike,
    *,
    processor: str | os.PathLike | None = None,
    prune_ratio: float | None = None,
    method: str | None = None,
    dtype: str | None = None,
    max_position_embeddings: int | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Conversion:
    """
    Converts a checkpoint, holding one of the shards that are written in memory and not more.

    Args:
        out (`str` or `os.PathLike`): the folder to make. It must not exist, but its parent must.
        source (`str` or `os.PathLike`):
            A native checkpoint of the reference (`config.yaml`, and `model.pt`, several such files, safetensors files
            or `model_and_optim`), or a Molmo2 or STTS checkpoint of the Hub (safetensors files, released names).
        processor (`str` or `os.PathLike`, *optional*):
            Folder with tokenizer and processor files, such as a Molmo2 checkpoint of the same size. A native
            checkpoint needs it, because it has none; otherwise that of the source is used.
        prune_ratio (`float`, *optional*): fraction of windows to remove, from 0 to below 1; the source's by default.
        method (`str`, *optional*): what scores windows, see `SttsConfig`; the source's by default.
        dtype (`str`, *optional*): `"bfloat16"`, `"float16"` or `"float32"`; the type of the embeddings by default.
        max_position_embeddings (`int`, *optional*):
            Longest prompt in tokens, for native checkpoints, whose own is that of their training.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): largest weight file, in bytes or as text.

    Returns:
        `Conversion`: the folder and a table of all tensors.

    Raises:
        FileExistsError: if `out` exists.
        FileNotFoundError: if a folder or a file is missing.
        ValueError: if an argument or the checkpoint is not valid: a tensor is missing, unknown, of a wrong shape or
            not finite, or a file is broken or holds more than tensors.
    """
    out, source = Path(out).absolute(), Path(source)
    check_out(out)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {DTYPES}, got {dtype!r}.")
    stts = {name: value for name, value in {"prune_ratio": prune_ratio, "method": method}.items() if value is not None}
    if (source / CONFIG_FILE).is_file():
        checkpoint = _read_native(source, processor, stts, max_position_embeddings)
    else:
        checkpoint = _read_released(source, processor, stts)
    pieces, rows = _plan(checkpoint, source, dtype)
    with new_folder(out) as folder:
        _write_weights(folder, pieces, checkpoint.config.dtype, max_shard_size)
        checkpoint.config.save_pretrained(folder)
        checkpoint.generation_config.save_pretrained(folder)
        checkpoint.processor.save_pretrained(folder)
        for name in CODE_FILES:
            shutil.copyfile(PACKAGE / name, folder / name)
        finish_folder(folder)
    return Conversion(out, rows)


class _Checkpoint(NamedTuple):
    config: Molmo2SttsConfig
    processor: Molmo2SttsProcessor
    generation_config: GenerationConfig
    may_lack_scorer: bool
    is_native: bool = False
    ties_weights: bool = False


def _read_native(
    source: Path, processor: str | os.PathLike | None, stts: dict, max_position_embeddings: int | None
) -> _Checkpoint:
    if processor is None:
        raise ValueError(f"{source} has no tokenizer: `processor` must be the folder of a Molmo2 checkpoint.")
    model = read_native_config(source / CONFIG_FILE)
    loaded = load_processor(Path(processor))
    tokenizer = loaded.tokenizer
    config = convert_config(model, tokenizer, max_position_embeddings)
    fields = config.to_dict()
    config = Molmo2SttsConfig(**{**fields, "stts_config": {**fields["stts_config"], **stts}})
    apply_preprocessing(model, loaded)
    token_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return _Checkpoint(
        config,
        loaded,
        GenerationConfig(**token_ids),
        may_lack_scorer=not is_pruned(model),
        is_native=True,
        ties_weights=bool(model.section("llm").get("weight_tying", False)),
    )


def _read_released(source: Path, processor: str | os.PathLike | None, stts: dict) -> _Checkpoint:
    config = load_config(source, stts)
    has_settings = (source / "generation_config.json").is_file()
    return _Checkpoint(
        config,
        load_processor(Path(processor or source)),
        GenerationConfig.from_pretrained(source) if has_settings else GenerationConfig(),
        may_lack_scorer=model_type(source) == "molmo2",
    )


def to_released_name(name: str) -> str:
    """
    The name that a tensor of a native checkpoint has in released ones.

    Args:
        name (`str`): such as `"transformer.blocks.3.att_proj.weight"`.

    Returns:
        `str`: such as `"model.transformer.blocks.3.self_attn.att_proj.weight"`.
    """
    if name == "transformer.ff_out.weight":
        return LM_HEAD
    match = LLM_BLOCK.match(name)
    if match is not None and match[2] in PARTS_OF_BLOCK:
        name = name[: match.start(2)] + PARTS_OF_BLOCK[match[2]] + name[match.start(2) :]
    return "model." + name


def _plan(checkpoint: _Checkpoint, source: Path, dtype: str | None) -> tuple[dict[str, _Piece], list[Row]]:
    """Where each tensor of the hub folder comes from, and the table. Sets what saving a model sets in its config."""
    config, files = checkpoint.config, open_weights(source)
    found = _locate(files, checkpoint.is_native)
    left_over = [Row("left over", name, "", "not a weight") for file in files for name in file.other_names]
    left_over += _set_unused_blocks_aside(found, config)
    if checkpoint.ties_weights and EMBEDDING in found:
        found[LM_HEAD] = found[EMBEDDING]
    model = _empty_model(config)
    _check_tensors(source, found, _expected_shapes(model, found), checkpoint.may_lack_scorer)
    config.architectures = [type(model).__name__]
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = found[EMBEDDING].spec.dtype if dtype is None else getattr(torch, dtype)
    rows = [
        _row(target, piece, target == LM_HEAD and checkpoint.ties_weights) for target, piece in found.items()
    ] + left_over
    if not any(target.startswith(SCORER) for target in found):
        for target, tensor in _new_scorer(model, config.dtype).items():
            found[target] = _Piece(TensorSpec(tuple(tensor.shape), tensor.dtype), tensor=tensor)
            rows.append(Row("initialised", "", target, f"{_words(found[target].spec)}, from seed {SCORER_SEED}"))
    return found, rows


def _locate(files: list[WeightFile], is_native: bool) -> dict[str, _Piece]:
    """The tensors of all files by their released names."""
    found: dict[str, _Piece] = {}
    for file in files:
        for name, spec in file.specs().items():
            target = to_released_name(name) if is_native else name
            if target in found:
                raise ValueError(f"{target} is in two files: {found[target].file.path} and {file.path}.")
            found[target] = _Piece(spec, file, name)
    return found


def _set_unused_blocks_aside(found: dict[str, _Piece], config: Molmo2SttsConfig) -> Iterator[Row]:
    for target in list(found):
        match = VIT_BLOCK.match(target)
        if match is not None and int(match[1]) >= config.vision_config.num_hidden_layers:
            piece = found.pop(target)
            yield Row("left over", piece.source, "", f"{_words(piece.spec)}, in a block after the last that is used")


def _check_tensors(source: Path, found: dict[str, _Piece], shapes: dict[str, tuple], may_lack_scorer: bool) -> None:
    missing = shapes.keys() - found.keys()
    scorer = {name for name in shapes if name.startswith(SCORER)}
    check_keys(source, "misses", missing - scorer if may_lack_scorer and scorer <= missing else missing)
    check_keys(source, "has unexpected", found.keys() - shapes.keys())
    wrong = {name for name in found.keys() & shapes.keys() if found[name].spec.shape != shapes[name]}
    check_keys(source, "has wrongly shaped", wrong)


def _empty_model(config: Molmo2SttsConfig) -> Molmo2SttsForConditionalGeneration:
    with torch.device("meta"):
        return Molmo2SttsForConditionalGeneration(config)


def _expected_shapes(model: Molmo2SttsForConditionalGeneration, found: dict[str, _Piece]) -> dict[str, tuple]:
    tensors = revert_weight_conversion(model, model.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if EMBEDDING in found:
        # Where the one table of the model is cut in two is the checkpoint's affair.
        num_rows, size = model.get_input_embeddings().weight.shape
        num_own = found[EMBEDDING].spec.shape[0]
        shapes |= {EMBEDDING: (num_own, size), NEW_EMBEDDING: (num_rows - num_own, size)}
    return shapes


def _new_scorer(model: Molmo2SttsForConditionalGeneration, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tower = model.model.vision_tower
    tower.scorer.to(dtype).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SCORER_SEED)
        for module in tower.scorer.modules():
            tower._init_weights(module)
    return revert_weight_conversion(model, tower.scorer.state_dict(prefix=SCORER_PREFIX))


def _row(target: str, piece: _Piece, is_copy: bool) -> Row:
    module = target.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    note = _words(piece.spec)
    if is_copy:
        return Row("copied", piece.source, target, f"{note}, because input and output embeddings are tied")
    if module in SPLIT_AT_LOAD:
        return Row("split", piece.source, target, f"{note}, into {', '.join(SPLIT_AT_LOAD[module])} when loaded")
    if target in (EMBEDDING, NEW_EMBEDDING):
        return Row("joined", piece.source, target, f"{note}, one table when loaded")
    return Row("kept" if target == piece.source else "renamed", piece.source, target, note)


def _words(spec: TensorSpec) -> str:
    return f"{list(spec.shape)} {spec.dtype}".replace("torch.", "")


def _write_weights(folder: Path, pieces: dict[str, _Piece], dtype: torch.dtype, max_shard_size: int | str) -> None:
    split = split_state_dict_into_shards_factory(
        pieces,
        get_storage_size=lambda piece: torch.Size(piece.spec.shape).numel() * dtype.itemsize,
        filename_pattern=SHARD_PATTERN,
        max_shard_size=max_shard_size,
    )
    for filename, names in tqdm(split.filename_to_tensors.items(), desc="Weights", unit="file"):
        tensors = dict(_read(pieces, names, dtype))
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        # Before the next ones are read.
        del tensors
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / SAFETENSORS_INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read(pieces: dict[str, _Piece], names: list[str], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for file, group in groupby(names, lambda name: pieces[name].file):
        targets = list(group)
        sources = [pieces[target].source for target in targets]
        tensors = [pieces[target].tensor for target in targets] if file is None else file.read(sources)
        for target, tensor in zip(targets, tensors):
            # A file cannot hold one memory by two names, nor a tensor with gaps.
            copy = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
            # After the change of type, which has its own largest number.
            if not is_finite(copy):
                words = f"not finite (NaN or infinite) as {dtype}".replace("torch.", "")
                raise ValueError(f"{pieces[target].source} has values that are {words}.")
            yield target, copy


__all__ = ["Conversion", "Row", "convert", "to_released_name"]
