"""Which release these files are, and which transformers they run with."""

import hashlib
import re
from pathlib import Path

from transformers import __version__ as transformers_version
from transformers.utils import logging


VERSION = "0.1.0"
TRANSFORMERS_RANGE = ">=5.20,<6"

logger = logging.get_logger(__name__)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


TRANSFORMERS = _numbers(transformers_version)


def check_transformers(version: str) -> None:
    """
    Says in one line that a transformers is outside the range: a warning above it, an error below.

    Args:
        version (`str`): such as `"5.23.0"`.

    Raises:
        ImportError: if it is below the range, where there is no Molmo2 to build on.
    """
    lowest, end = (_numbers(bound) for bound in TRANSFORMERS_RANGE.split(","))
    message = f"STTS {VERSION} is made for transformers{TRANSFORMERS_RANGE}, and this is transformers {version}."
    if _numbers(version) < lowest:
        raise ImportError(message)
    if _numbers(version) >= end:
        logger.warning(message)


def code_file_hashes(folder: str | Path) -> dict[str, str]:
    """
    SHA-256 of the code files of a hub folder or of this package.

    Args:
        folder (`str` or `Path`): all its `*.py` files count, except `__init__.py`, which is not part of a hub folder.

    Returns:
        `dict[str, str]`: hexadecimal hash by file name, sorted by name.
    """
    paths = sorted(path for path in Path(folder).glob("*.py") if path.name != "__init__.py")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def code_hash(folder: str | Path) -> str:
    """
    One hash of all code files of a folder: what `LC_ALL=C; sha256sum *.py | sha256sum` prints in a hub folder.

    Args:
        folder (`str` or `Path`): see `code_file_hashes`.
    """
    lines = "".join(f"{digest}  {name}\n" for name, digest in code_file_hashes(folder).items())
    return hashlib.sha256(lines.encode()).hexdigest()


# Here and not where it is asked for: below the range, the imports of the other files fail in words of no help.
check_transformers(transformers_version)

__all__ = ["TRANSFORMERS_RANGE", "VERSION", "check_transformers", "code_file_hashes", "code_hash"]
