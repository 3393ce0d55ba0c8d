"""Turns conversations into tokens, labels and pixels, in the worker processes of the data loader."""

from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset

from .samples import MEDIA, Sample


ON_BAD_VIDEO = ("fail", "skip")


class UnreadableError(ValueError):
    """A video or an image that cannot be decoded."""


def find_answers(processor, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """
    Writes a conversation by the chat template and finds what the assistant says, and the token that ends its turn.

    Templates of Molmo2 do not mark the assistant's turns (`{% generation %}`), so they are found by writing the
    beginning of the conversation, up to a turn and up to its end: what the second adds is the turn.

    Args:
        processor (`Molmo2SttsProcessor`): has the template.
        messages (`list[dict]`): the conversation.

    Returns:
        `tuple[str, list[tuple[int, int]]]`: the text, with one placeholder for each video or image; and where each
        turn of the assistant begins and ends in it, in characters.

    Raises:
        ValueError: if the template writes the beginning of this conversation in another way than the whole.
    """
    write = partial(processor.apply_chat_template, tokenize=False)
    text, spans = write(messages), []
    for turn in (turn for turn, message in enumerate(messages) if message["role"] == "assistant"):
        asked = write(messages[:turn], add_generation_prompt=True)
        # What follows the token that ends a turn, often a line break, is not generated.
        answered = write(messages[: turn + 1]).rstrip()
        if not (answered.startswith(asked) and text.startswith(answered)):
            raise ValueError(
                f"the chat template does not write message {turn} of the conversation behind the prompt that asks "
                "for it, so that its tokens cannot be found. Use a template whose text only grows with the messages."
            )
        spans.append((len(asked), len(answered)))
    return text, spans


class Encoder:
    """
    Encodes samples.

    Args:
        processor (`Molmo2SttsProcessor`): samples frames as its settings say, which are saved with the model.
        max_length (`int`, *optional*): positions of the language model; `None` if only kept tokens take one.
    """

    def __init__(self, processor, max_length: int | None):
        self.processor, self.max_length = processor, max_length

    def __call__(self, sample: Sample) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `input_ids`, `labels` (-100 but for the assistant's turns) and `mm_token_type_ids`, of shape
            `(length,)`, int64; and what the processor makes of its images or its video.

        Raises:
            UnreadableError: if a video or an image cannot be decoded.
            ValueError: if the chat template does not fit, or the sample is longer than the positions.
        """
        text, spans = find_answers(self.processor, sample.messages)
        # The processor would do this, and the places of the answers would not fit any more.
        begin = self.processor.tokenizer.bos_token or self.processor.tokenizer.eos_token
        shift = 0 if text.startswith(begin) else len(begin)
        inputs = self._process(sample, begin[:shift] + text)
        (replaced,) = inputs.pop("text_replacement_offsets")
        offsets = inputs.pop("offset_mapping")[0]
        del inputs["attention_mask"]
        inputs |= {name: inputs[name][0] for name in ("input_ids", "mm_token_type_ids")}
        length = len(inputs["input_ids"])
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"the sample takes {length} positions, but the language model has {self.max_length}. Sample fewer "
                "frames (--num_frames), or let only kept tokens take positions ("
                """--stts_config '{"position_ids": "compact"}')."""
            )
        is_answer = torch.zeros(length, dtype=torch.bool)
        for span in spans:
            start, end = (_place_after_expansion(place + shift, replaced) for place in span)
            is_answer |= (offsets[:, 0] >= start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
        return inputs | {"labels": inputs["input_ids"].masked_fill(~is_answer, -100)}

    def _process(self, sample: Sample, text: str) -> dict[str, Any]:
        media = {kind: sample.media(kind) for kind in MEDIA}
        tokens = {"image": self.processor.image_token, "video": self.processor.video_token}
        for kind, paths in media.items():
            found = text.count(tokens[kind])
            if found != len(paths):
                raise ValueError(
                    f"the chat template writes {found} placeholders {tokens[kind]} for {len(paths)} {kind}s; a text "
                    "must not hold that token."
                )
        try:
            inputs = self.processor(
                text=[text],
                images=[media["image"]] if media["image"] else None,
                videos=[media["video"]] if media["video"] else None,
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                return_tensors="pt",
            )
        # What torchvision raises for an image is a `RuntimeError`, and does not name it.
        except (OSError, RuntimeError, ValueError) as error:
            if not any(media.values()):
                raise
            raise UnreadableError(str(error) if media["video"] else f"{', '.join(media['image'])}: {error}") from error
        return dict(inputs)


def _place_after_expansion(place: int, replaced: list[dict[str, Any]]) -> int:
    """Where a character stands after the placeholders before it were replaced."""
    before = [r for r in replaced if r["span"][1] <= place]
    return place + (before[-1]["new_span"][1] - before[-1]["span"][1] if before else 0)


class ConversationDataset(Dataset):
    """
    Samples, encoded as they are asked for.

    Args:
        samples (`list[Sample]`): at least one.
        encoder (`Encoder`): encodes them.
        on_bad_video (`str`): what becomes of a sample whose video or image cannot be decoded: `"fail"` raises;
            `"skip"` takes the next sample that can be in its place, so that batches keep their size and a training
            that goes on later sees the same ones.

    An item is a `dict`: what `Encoder` returns, `where` (`str`), and `skipped` (`dict` from `where` to the reason).
    """

    def __init__(self, samples: list[Sample], encoder: Encoder, on_bad_video: str = "fail"):
        if on_bad_video not in ON_BAD_VIDEO:
            raise ValueError(f"`on_bad_video` must be one of {ON_BAD_VIDEO}, got {on_bad_video!r}.")
        self.samples, self.encoder, self.on_bad_video = samples, encoder, on_bad_video

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        skipped = {}
        for place in range(i, i + len(self)):
            sample = self.samples[place % len(self)]
            try:
                return self.encoder(sample) | {"where": sample.where, "skipped": skipped}
            except UnreadableError as error:
                if self.on_bad_video == "fail":
                    raise ValueError(f"{sample.where}: {error} (--on_bad_video skip leaves it out)") from error
                skipped[sample.where] = str(error)
            except ValueError as error:
                raise ValueError(f"{sample.where}: {error}") from error
        where, reason = skipped.popitem()
        raise ValueError(f"none of the {len(self)} samples can be decoded; one of them is {where}: {reason}")
