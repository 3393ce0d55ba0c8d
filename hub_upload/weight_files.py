"""Reads weights tensor by tensor from safetensors files, torch files and distributed checkpoints. None is trusted."""

import json
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import metadata


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DISTRIBUTED = "model_and_optim"
METADATA = ".metadata"
# Names of tensors in a distributed checkpoint, beside those of the optimizer.
MODEL_PREFIX = "model."
# What the metadata of a distributed checkpoint is made of: descriptions of tensors, and nothing that does anything.
METADATA_NAMES = frozenset(
    [
        *(
            f"torch.distributed.checkpoint.metadata.{name}"
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.serialization._get_layout",
        "torch.Size",
        "collections.OrderedDict",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
    ]
)


class TensorSpec(NamedTuple):
    """Shape and type of a tensor that was not read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class WeightFile(ABC):
    """A file with weights. `path` (`Path`): where it is. `other_names` (`list[str]`): entries that are no weights."""

    def __init__(self, path: Path):
        self.path = path
        self.other_names: list[str] = []

    @abstractmethod
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors by name, in the order of the file."""

    @abstractmethod
    def read(self, names: Iterable[str]) -> Iterator[torch.Tensor]:
        """The tensors of these names, one at a time."""


class SafetensorsFile(WeightFile):
    """A safetensors file."""

    def specs(self) -> dict[str, TensorSpec]:
        with self._open() as file:
            return {name: self._spec(name, file.get_slice(name)) for name in sorted(file.keys())}

    def read(self, names: Iterable[str]) -> Iterator[torch.Tensor]:
        with self._open() as file:
            for name in names:
                yield file.get_tensor(name)

    def _spec(self, name: str, part: Any) -> TensorSpec:
        if part.get_dtype() not in SAFETENSORS_DTYPES:
            raise ValueError(f"{self.path}: {name} has the unsupported type {part.get_dtype()}.")
        return TensorSpec(tuple(part.get_shape()), SAFETENSORS_DTYPES[part.get_dtype()])

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error


class TorchFile(WeightFile):
    """A file of `torch.save` with a dictionary of tensors. It is mapped into memory, so only what is used is read."""

    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self._load().items()}

    def read(self, names: Iterable[str]) -> Iterator[torch.Tensor]:
        state = self._load()
        for name in names:
            yield state[name]

    def _load(self) -> dict[str, torch.Tensor]:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{self.path} is not a whole file with tensors alone: {reason}") from error
        if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise ValueError(f"{self.path} is not a dictionary of tensors.")
        return state


class DistributedCheckpoint(WeightFile):
    """A folder of `torch.distributed.checkpoint`, in which tensors may be in parts. The optimizer's are left out."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.reader = _TensorReader(path)
        entries = self.reader.metadata.state_dict_metadata
        self.tensors = {
            name.removeprefix(MODEL_PREFIX): entry
            for name, entry in entries.items()
            if name.startswith(MODEL_PREFIX) and isinstance(entry, metadata.TensorStorageMetadata)
        }
        self.other_names = [name for name in entries if name.removeprefix(MODEL_PREFIX) not in self.tensors]

    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(tuple(entry.size), entry.properties.dtype) for name, entry in self.tensors.items()}

    def read(self, names: Iterable[str]) -> Iterator[torch.Tensor]:
        for name in names:
            entry = self.tensors[name]
            state = {MODEL_PREFIX + name: torch.empty(entry.size, dtype=entry.properties.dtype)}
            try:
                with warnings.catch_warnings():
                    # It announces for each tensor that one process alone is loading, which is meant here.
                    warnings.filterwarnings("ignore", message="torch.distributed is")
                    dcp.load(state, storage_reader=self.reader, no_dist=True)
            except dcp.CheckpointException as error:
                raise ValueError(f"{self.path}: {name} cannot be read: {error}") from error
            yield state[MODEL_PREFIX + name]


class _TensorReader(dcp.FileSystemReader):
    """
    Differences from `FileSystemReader`: the metadata may hold descriptions of tensors and nothing else, and is read
    once, not for each tensor.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.metadata = self._read_metadata()

    def read_metadata(self, *args, **kwargs) -> metadata.Metadata:
        # As the class that this one stands for does.
        self.metadata.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return self.metadata

    def _read_metadata(self) -> metadata.Metadata:
        path = Path(self.path) / METADATA
        try:
            with open(path, "rb") as file:
                return _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(f"{path} is not the metadata of a distributed checkpoint: {error}") from error


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or f"{module}.{name}" in METADATA_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of floats has no NaN and no infinite value. Needs no memory of the tensor's size."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def open_weights(folder: Path) -> list[WeightFile]:
    """
    The weight files of a checkpoint.

    Args:
        folder (`Path`):
            Holds `model.safetensors.index.json` with its files, `model*.safetensors`, `model*.pt`, or the folder
            `model_and_optim` of a distributed checkpoint; the first of these that is there is used.

    Raises:
        FileNotFoundError: if there are no weights, or a file that the index names is missing.
        ValueError: if the index or the metadata of a distributed checkpoint cannot be read.
    """
    index = folder / SAFETENSORS_INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            outside = [name for name in names if Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of weights.") from error
        if not names:
            raise ValueError(f"{index} names no weights.")
        if outside:
            raise ValueError(f"{index} is not an index of weights: {outside[0]} is not the name of a file beside it.")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} misses weight files that its index names: {', '.join(missing)}.")
        return [SafetensorsFile(folder / name) for name in names]
    for pattern, kind in {"model*.safetensors": SafetensorsFile, "model*.pt": TorchFile}.items():
        paths = sorted(folder.glob(pattern))
        if paths:
            return [kind(path) for path in paths]
    if (folder / DISTRIBUTED / METADATA).is_file():
        return [DistributedCheckpoint(folder / DISTRIBUTED)]
    raise FileNotFoundError(f"{folder} has no weights (model*.safetensors, model*.pt or {DISTRIBUTED}/{METADATA}).")


__all__ = ["TensorSpec", "WeightFile", "is_finite", "open_weights"]
