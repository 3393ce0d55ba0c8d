"""Folders that are made whole or not at all. Imports nothing that takes time."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_out(out: Path) -> None:
    """Raises a `FileExistsError` if a folder to make exists, and a `FileNotFoundError` if its parent does not."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists. The output folder must be a new one; nothing is ever overwritten.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"The output folder's parent {out.parent} does not exist or is not a folder.")


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """
    A folder that gets its name when everything in it is written; if that fails, nothing of it is left.

    Args:
        out (`str` or `os.PathLike`): the folder to make. It must not exist, but its parent must.

    Raises:
        FileExistsError: if `out` exists.
        FileNotFoundError: if its parent does not.
    """
    out = Path(out).absolute()
    check_out(out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        # A folder inside the temporary one, which only its owner may read.
        folder = Path(scratch) / "folder"
        folder.mkdir()
        yield folder
        os.rename(folder, out)
