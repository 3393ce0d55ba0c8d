import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from hub_upload.weight_files import TensorSpec, is_finite, open_weights


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"b.weight": (4, 3), "a.bias": (5,), "c.scale": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save_safetensors(tensors, folder):
    save_file(tensors, folder / "model.safetensors")


def save_shards(tensors, folder):
    names = sorted(tensors)
    weight_map = {name: f"model-0000{i + 1}-of-00003.safetensors" for i, name in enumerate(names)}
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def save_torch(tensors, folder):
    torch.save(tensors, folder / "model.pt")


def save_torch_shards(tensors, folder):
    for i, (name, tensor) in enumerate(tensors.items()):
        torch.save({name: tensor}, folder / f"model_{i}.pt")


def save_distributed(tensors, folder):
    state = {"model": tensors, "optim": {"step": torch.zeros(2), "lr": 0.1}}
    dcp.save(state, checkpoint_id=folder / "model_and_optim", no_dist=True)


SAVERS = [save_safetensors, save_shards, save_torch, save_torch_shards, save_distributed]


@pytest.mark.parametrize("save", SAVERS)
def test_all_formats_give_the_same_tensors(tensors, tmp_path, save):
    save(tensors, tmp_path)
    files = open_weights(tmp_path)
    assert len(files) == (3 if "shards" in save.__name__ else 1)
    read, specs = {}, {}
    for file in files:
        specs |= file.specs()
        read |= dict(zip(file.specs(), file.read(file.specs())))
    assert specs == {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    others = [name for file in files for name in file.other_names]
    assert others == (["optim.step", "optim.lr"] if save is save_distributed else [])


def test_number_of_bytes():
    assert TensorSpec((3, 4), torch.bfloat16).num_bytes == 24 and TensorSpec((), torch.float32).num_bytes == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_finite(dtype):
    tensor = torch.randn(3, 4).to(dtype)
    assert is_finite(tensor) and is_finite(tensor[:0]) and is_finite(tensor[0, 0])
    for value in (torch.nan, torch.inf, -torch.inf):
        tensor[1, 2] = value
        assert not is_finite(tensor)


def test_no_weights_and_a_missing_shard(tensors, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no weights"):
        open_weights(tmp_path)
    save_shards(tensors, tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index names: model-00002-of-00003\.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="not an index"):
        open_weights(tmp_path)


def test_truncated_files(tensors, tmp_path):
    for save, name in ((save_torch, "model.pt"), (save_safetensors, "model.safetensors")):
        save(tensors, tmp_path)
        os.truncate(tmp_path / name, 90)
        with pytest.raises(ValueError, match=f"{name} "):
            open_weights(tmp_path)[0].specs()


def test_a_truncated_distributed_checkpoint(tensors, tmp_path):
    save_distributed(tensors, tmp_path)
    os.truncate(next((tmp_path / "model_and_optim").glob("*.distcp")), 10)
    file = open_weights(tmp_path)[0]
    with pytest.raises(ValueError, match=r"model_and_optim: b\.weight cannot be read"):
        list(file.read(["b.weight"]))


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_is_unpickled_that_is_not_a_tensor(tensors, tmp_path):
    trap = Trap(tmp_path / "it ran")
    torch.save({**tensors, "trap": trap}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt is not a whole file with tensors alone"):
        open_weights(tmp_path)[0].specs()
    (tmp_path / "model.pt").unlink()
    save_distributed(tensors, tmp_path)
    path = tmp_path / "model_and_optim" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = trap
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"metadata of a distributed checkpoint: it asks for (_?io|builtins)\.open"):
        open_weights(tmp_path)
    assert not trap.path.exists()


def test_a_file_with_something_else_than_a_dictionary_of_tensors(tmp_path):
    for content in ([torch.zeros(1)], {"step": 3}):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(ValueError, match="not a dictionary of tensors"):
            open_weights(tmp_path)[0].specs()


def test_quantised_weights_are_not_supported(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a has the unsupported type I8"):
        open_weights(tmp_path)[0].specs()


def test_an_index_may_name_files_of_its_folder_only(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    for name in ("../model.safetensors", str(tmp_path / "model.safetensors"), 5):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match="is not an index of weights"):
            open_weights(folder)
