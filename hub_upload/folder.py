"""What a hub folder may hold, and one hash of all it holds."""

import hashlib
import os
import re
import tempfile
from pathlib import Path

from huggingface_hub.utils import tqdm
from huggingface_hub.utils.sha import sha_fileobj

import modeling_stts
from modeling_stts.stts_release import code_file_hashes


PACKAGE = Path(modeling_stts.__file__).parent
CODE_FILES = frozenset(code_file_hashes(PACKAGE))
OTHER_FILES = frozenset(
    [
        "LICENSE",
        "README.md",
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.json",
    ]
)
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def may_be_published(name: str) -> bool:
    """Whether a name is on the allow-list: weights, configurations, processor, tokenizer, card and our code files."""
    return name in OTHER_FILES or SHARD.fullmatch(name) is not None or name in CODE_FILES


def list_files(folder: str | os.PathLike) -> list[Path]:
    """
    The files of a hub folder, sorted by name.

    Args:
        folder (`str` or `os.PathLike`): may hold regular files of the allow-list and nothing else.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no weights.
        ValueError: naming the first entry that is a link, a folder or not on the allow-list.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not an existing folder.")
    paths = sorted(folder.iterdir())
    for path in paths:
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link to {os.readlink(path)}; a hub folder holds real files only.")
        if not path.is_file():
            raise ValueError(f"{path} is not a regular file; a hub folder has no folders inside.")
        if not may_be_published(path.name):
            raise ValueError(f"{path} is not on the allow-list of files that may be published.")
    if not any(path.suffix == ".safetensors" for path in paths):
        raise FileNotFoundError(f"{folder} has no weights (*.safetensors).")
    return paths


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()


def file_hashes(folder: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of each file of a hub folder by its name; raises what `list_files` raises."""
    paths = tqdm(list_files(folder), desc="Hashes", unit="file", leave=False)
    return {path.name: file_hash(path) for path in paths}


def folder_hash(hashes: dict[str, str]) -> str:
    """One SHA-256 of the names and hashes that `file_hashes` returns."""
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in hashes.items()).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a file at once: whoever reads it, or whatever stops the writing, the file is whole."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as scratch:
        new = Path(scratch) / path.name
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
