"""Makes a complete hub folder: weights, configuration, code files, processor, tokenizer and generation config."""

import json
import logging
import os
from pathlib import Path

import torch
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import GenerationConfig, Molmo2Config

from modeling_stts import (
    Molmo2SttsConfig,
    Molmo2SttsForConditionalGeneration,
    Molmo2SttsProcessor,
    Molmo2SttsVideoProcessor,
)

from .folder import list_files
from .new_folder import check_out, new_folder
from .tiny import tiny_model, tiny_processor
from .weight_files import is_finite, open_weights


TINY = "tiny"
SOURCE_CONFIGS = {"molmo2": Molmo2Config, "molmo2_stts": Molmo2SttsConfig}
DTYPES = ("bfloat16", "float16", "float32")
SCORER_PREFIX = "model.vision_tower.scorer."
SCORER_SEED = 0
# Smaller than what others use, so that an upload that is interrupted goes on near where it was.
MAX_SHARD_SIZE = "5GB"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

logger = logging.getLogger(__name__)


def build_hub_folder(
    out: str | os.PathLike,
    source: str | os.PathLike = TINY,
    prune_ratio: float | None = None,
    method: str | None = None,
    dtype: str | None = None,
    *,
    adapter: str | os.PathLike | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """
    Makes a hub folder that loads with `trust_remote_code=True`. The same input gives the same bytes.

    A scorer that the source does not have is initialised from a fixed seed, and a logged warning says so.

    Args:
        out (`str` or `os.PathLike`): the folder to make. It must not exist, but its parent must.
        source (`str` or `os.PathLike`, *optional*, defaults to `"tiny"`):
            A local folder with a Molmo2 checkpoint (weights by native or released names) or with an STTS checkpoint;
            `"tiny"` is the tiny random model of `hub_upload.tiny` (write `./tiny` for a folder of that name).
        prune_ratio (`float`, *optional*):
            Fraction of a video's windows to remove, `0 <= prune_ratio < 1`; the source's or the default if not given.
        method (`str`, *optional*): what scores windows, see `SttsConfig`; the source's or the default if not given.
        dtype (`str`, *optional*): `"bfloat16"`, `"float16"` or `"float32"`; the source's if not given.
        adapter (`str` or `os.PathLike`, *optional*):
            Local folder with a LoRA adapter of PEFT for the source, to be merged into its weights. Needs `peft`.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): largest weight file, in bytes or as text.

    Returns:
        `Path`: the folder.

    Raises:
        FileExistsError: if `out` exists.
        FileNotFoundError: if the parent of `out`, the source, the adapter or one of their files does not exist.
        ValueError: if an argument is out of its range, the source is not a whole checkpoint of a supported type, the
            adapter does not fit it, or weights are not finite.
    """
    out = Path(out).absolute()
    check_out(out)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {DTYPES}, got {dtype!r}.")
    given = {"prune_ratio": prune_ratio, "method": method}
    stts = {name: value for name, value in given.items() if value is not None}
    if source == TINY:
        model = tiny_model(**stts)
        processor = tiny_processor(model.config)
    else:
        config = load_config(Path(source), stts)
        processor = load_processor(Path(source))
        model = load_model(Path(source), config, dtype)
    if adapter is not None:
        model = _merge_adapter(model, Path(adapter))
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    _check_finite(model)
    with new_folder(out) as folder:
        # Both copy the code files that their classes reach, which are all of them.
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        finish_folder(folder)
    return out


def model_type(source: Path) -> str:
    """
    The model type of a checkpoint: `"molmo2"` or `"molmo2_stts"`.

    Raises:
        FileNotFoundError: if the folder or its config.json does not exist.
        ValueError: if it is of another type or says none.
    """
    if not source.is_dir():
        raise FileNotFoundError(f'The source {source} is not an existing folder (nor "{TINY}").')
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{source} has no config.json, so it is not a checkpoint.")
    try:
        found = json.loads(path.read_bytes())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a model configuration: no `model_type` can be read from it.") from error
    if found not in SOURCE_CONFIGS:
        raise ValueError(
            f"{source} has the unsupported model_type {found!r}; supported are {', '.join(SOURCE_CONFIGS)}."
        )
    return found


def load_config(source: Path, stts: dict) -> Molmo2SttsConfig:
    """
    Our configuration for a Molmo2 or STTS checkpoint.

    Args:
        source (`Path`): the checkpoint's folder.
        stts (`dict`): fields of `SttsConfig` to replace.

    Raises:
        FileNotFoundError, ValueError: as `model_type` does, and if a field is not valid.
    """
    config_class = SOURCE_CONFIGS[model_type(source)]
    try:
        fields = config_class.from_pretrained(source).to_dict()
    except StrictDataclassError as error:
        raise ValueError(f"{source / 'config.json'} has a field of the wrong type: {error}") from error
    for name in ("model_type", "architectures", "auto_map", "custom_pipelines"):
        fields.pop(name, None)
    fields["stts_config"] = {**fields.get("stts_config", {}), **stts}
    return Molmo2SttsConfig(**fields)


def load_processor(source: Path) -> Molmo2SttsProcessor:
    """
    Our processor with the settings of a checkpoint.

    Raises:
        FileNotFoundError: if a file of it does not exist.
        ValueError: if it cannot be loaded or has no chat template.
    """
    if not (source / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{source} has no tokenizer_config.json, so its tokenizer cannot be loaded.")
    if not any((source / name).is_file() for name in PROCESSOR_FILES):
        raise FileNotFoundError(f"{source} has no processor files; one of {', '.join(PROCESSOR_FILES)} must exist.")
    try:
        processor = Molmo2SttsProcessor.from_pretrained(source, trust_remote_code=False)
        processor.video_processor = Molmo2SttsVideoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"The processor of {source} cannot be loaded: {error}") from error
    if processor.chat_template is None and processor.tokenizer.chat_template is None:
        raise ValueError(f"{source} has no chat template (chat_template.jinja).")
    # The released checkpoints point at code files of their own, which are not in our folder.
    for settings in (vars(processor), vars(processor.image_processor), vars(processor.video_processor)):
        settings.pop("auto_map", None)
    processor.tokenizer.init_kwargs.pop("auto_map", None)
    return processor


def load_model(source: Path, config: Molmo2SttsConfig, dtype: str | None) -> Molmo2SttsForConditionalGeneration:
    """
    Our model with the weights of a checkpoint. A scorer that it does not have is initialised from a fixed seed, and a
    logged warning says so.

    Args:
        source (`Path`): the checkpoint's folder.
        config (`Molmo2SttsConfig`): see `load_config`.
        dtype (`str`, *optional*): one of `DTYPES`; the checkpoint's if not given.

    Raises:
        ValueError: if weights cannot be read, are missing, are not the model's or have another shape.
    """
    if (source / SAFETENSORS_INDEX_FILE).is_file():
        open_weights(source)  # for its words on an index that is not valid or names a file that is missing
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SCORER_SEED)
        try:
            model, info = Molmo2SttsForConditionalGeneration.from_pretrained(
                source, config=config, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
            )
        except SafetensorError as error:
            raise ValueError(f"The weights of {source} cannot be read: {error}") from error
    # Saving undoes only the renamings that loading needed, and those of a scorer that was not there are no such ones.
    del model._weight_conversions
    # `from_pretrained` replaces one that it cannot read by the default, without a word.
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    _check_weights(source, {name for name in model.state_dict() if name.startswith(SCORER_PREFIX)}, info)
    return model


def _check_weights(source: Path, scorer: set[str], info: dict) -> None:
    missing = set(info["missing_keys"])
    has_no_scorer = model_type(source) == "molmo2" and missing >= scorer
    check_keys(source, "misses", missing - scorer if has_no_scorer else missing)
    check_keys(source, "has unexpected", set(info["unexpected_keys"]))
    check_keys(source, "has wrongly shaped", {key[0] for key in info["mismatched_keys"]})
    if has_no_scorer:
        logger.warning(
            "Freshly initialised from seed %d: the %d parameters under `%s`, because %s has no scorer.",
            SCORER_SEED,
            len(scorer),
            SCORER_PREFIX,
            source,
        )


def check_keys(source: Path, problem: str, keys: set[str]) -> None:
    """Raises a `ValueError` that counts the keys and names the first of them, if there are any."""
    if keys:
        shown = ", ".join(sorted(keys)[:5]) + (", ..." if len(keys) > 5 else "")
        raise ValueError(f"{source} {problem} weights; every weight of the model must fit. {len(keys)}: {shown}")


def _merge_adapter(model: Molmo2SttsForConditionalGeneration, adapter: Path) -> Molmo2SttsForConditionalGeneration:
    missing = [name for name in ADAPTER_FILES if not (adapter / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{adapter} is not a folder with an adapter: it has no {', '.join(missing)}.")
    try:
        import peft  # only who merges an adapter needs it
    except ImportError as error:
        raise ValueError('Merging an adapter needs peft: pip install "modeling-stts[lora]".') from error
    try:
        config = peft.PeftConfig.from_pretrained(adapter)
    except (KeyError, TypeError, ValueError) as error:
        path = adapter / ADAPTER_FILES[0]
        raise ValueError(f"{path} is not the configuration of an adapter: {error!r}") from error
    if config.peft_type != peft.PeftType.LORA:
        raise ValueError(f"{adapter} is an adapter of the type {config.peft_type}; only LoRA can be merged.")
    config.inference_mode = True
    try:
        tuned = peft.get_peft_model(model, config)
        weights = peft.load_peft_weights(adapter, device="cpu")
        expected = peft.get_peft_model_state_dict(tuned)
    except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The adapter {adapter} does not fit the model: {error}") from error
    check_keys(adapter, "misses", expected.keys() - weights.keys())
    check_keys(adapter, "has unexpected", weights.keys() - expected.keys())
    check_keys(
        adapter, "has wrongly shaped", {name for name in weights if weights[name].shape != expected[name].shape}
    )
    peft.set_peft_model_state_dict(tuned, weights)
    return tuned.merge_and_unload()


def _check_finite(model: Molmo2SttsForConditionalGeneration) -> None:
    for name, tensor in model.state_dict().items():
        if not is_finite(tensor):
            raise ValueError(f"{name} has values that are not finite (NaN or infinite).")


def finish_folder(folder: Path) -> None:
    """
    Lets everybody read a complete folder.

    Raises:
        ValueError: if it holds something that is not on the allow-list.
    """
    for path in list_files(folder):
        # Weights are written for their owner alone.
        path.chmod(0o644)


__all__ = ["build_hub_folder"]
