"""Reads conversations, the samples of a training, from JSONL files, and checks them before anything is trained.

One line is one sample, in the chat format of transformers and of data sets on the Hub:

    {"messages": [{"role": "user", "content": [{"type": "video", "path": "clip.mp4"},
                                               {"type": "text", "text": "What happens?"}]},
                  {"role": "assistant", "content": "A cat jumps."}]}

A part of type "video" or "image" names its file by "path", "url" or its own type, or the line has lists "videos" and
"images" beside "messages", in the order of the parts. Paths are relative to the JSONL file.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


ROLES = ("system", "user", "assistant")
MEDIA = ("image", "video")


class Sample(NamedTuple):
    """
    messages (`list[dict]`): the conversation; images and videos have a "path", absolute or an http(s) address.
    where (`str`): file and line it comes from, such as `"train.jsonl:3"`.
    """

    messages: list[dict[str, Any]]
    where: str

    def media(self, kind: str) -> list[str]:
        """
        Paths of its images or videos, in order.

        Args:
            kind (`str`): `"image"` or `"video"`.
        """
        return [part["path"] for part in _parts(self.messages) if part["type"] == kind]


def read_samples(path: str | os.PathLike) -> list[Sample]:
    """
    Args:
        path (`str` or `os.PathLike`): a JSONL file; empty lines are left out.

    Returns:
        `list[Sample]`: at least one.

    Raises:
        ValueError: naming the line, if it is not a conversation that can be trained on; if there is none; or if the
            file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a JSONL file: {error}") from error
    samples = [
        _read_line(line, f"{path}:{number}", path.absolute().parent)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not samples:
        raise ValueError(f"{path} has no samples; every line must be an object with `messages`.")
    return samples


def _read_line(line: str, where: str, folder: Path) -> Sample:
    try:
        return Sample(_read_messages(json.loads(line), folder), where)
    except ValueError as error:  # what JSON raises is one too
        raise ValueError(f"{where}: {error}") from error


def _read_messages(row: Any, folder: Path) -> list[dict[str, Any]]:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("a sample must be an object with a list `messages` of objects.")
    beside = {kind: iter(row.get(f"{kind}s") or []) for kind in MEDIA}
    messages = [_read_message(message, beside, folder) for message in messages]
    left = [f"{kind}s" for kind in MEDIA if next(beside[kind], None) is not None]
    if left:
        raise ValueError(f"`{left[0]}` has more entries than `messages` has parts of that type.")
    _check_turns(messages)
    return messages


def _read_message(message: dict[str, Any], beside: dict[str, Iterator[str]], folder: Path) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"the role of a message must be one of {ROLES}, got {role!r}.")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError("the content of a message must be a text or a list of parts.")
    return {"role": role, "content": [_read_part(part, beside, folder) for part in content]}


def _read_part(part: dict[str, Any], beside: dict[str, Iterator[str]], folder: Path) -> dict[str, str]:
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in MEDIA:
        raise ValueError(f'a part must have the type "text" with a `text`, "image" or "video", got {part}.')
    named = [part[key] for key in ("path", "url", kind) if part.get(key) is not None]
    path = named[0] if named else next(beside[kind], None)
    if not isinstance(path, str):
        raise ValueError(f'a part of the type "{kind}" must name its file by "path", got {part}.')
    is_address = path.startswith(("http://", "https://"))
    return {"type": kind, "path": path if is_address else str(folder / path)}


def _check_turns(messages: list[dict[str, Any]]) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError("the conversation has no turn of the assistant, so there is nothing to learn from it.")
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError("the first turn of the assistant must follow one of the user.")
    media = [part["type"] for part in _parts(messages) if part["type"] in MEDIA]
    if media.count("video") > 1 or len(set(media)) > 1:
        raise ValueError(
            f"Molmo2 takes one video or several images in a conversation, got {media.count('video')} videos and "
            f"{media.count('image')} images."
        )
    if any(part["type"] in MEDIA for part in _parts(m for m in messages if m["role"] == "assistant")):
        raise ValueError("a turn of the assistant must be text alone.")


def _parts(messages) -> Iterator[dict[str, str]]:
    for message in messages:
        if not isinstance(message["content"], str):
            yield from message["content"]
