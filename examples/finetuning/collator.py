"""Puts encoded samples into batches, padded or packed.

Natively a row holds one sample, with one video or several images, and a batch has either videos or images. Here rows
hold several samples and batches mix videos, images and text, and every sample still gets what it would get alone:
`training_forward` hides samples from each other, counts their positions by themselves and gives each its own features.
"""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from modeling_stts.stts_packing import plan_bins


# What the processor returns for images and for videos, by what is at the same place in both.
PIXELS, POOLING, GRIDS = "pixels", "pooling", "grids"
MEDIA_INPUTS = {
    "image": {PIXELS: "pixel_values", POOLING: "image_token_pooling", GRIDS: "image_grids"},
    "video": {PIXELS: "pixel_values_videos", POOLING: "video_token_pooling", GRIDS: "video_grids"},
}


class Collator:
    """
    Makes batches of what `ConversationDataset` returns.

    Args:
        pad_token_id (`int`): stands behind rows that are shorter than the longest.
        pack (`bool`): whether short samples share a row, of the longest sample's length. The loss is the same.

    A batch is a `dict` of:
    - `input_ids`, `labels` and `mm_token_type_ids`, of shape `(num_rows, longest)`, int64;
    - `sample_idx` of the same shape: 1 for the batch's first sample, 2 for the second, ...; 0 = padding;
    - `is_video` of shape `(num_videos + num_images,)`, bool: in the order of the samples;
    - what the processor returns for a batch of its videos and of its images, where it has any;
    - `where` (`list[str]`): the samples' files and lines; `skipped` (`dict`): see `ConversationDataset`.
    """

    def __init__(self, pad_token_id: int, pack: bool = False):
        self.pad_token_id, self.pack = pad_token_id, pack

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        rows = self._make_rows([len(item["input_ids"]) for item in items])
        items = [items[i] for row in rows for i in row]
        ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
        rows = [range(end - len(row), end) for row, end in zip(rows, ends)]
        lengths = [torch.tensor([len(items[i]["input_ids"]) for i in row]) for row in rows]
        paddings = {"input_ids": self.pad_token_id, "labels": -100, "mm_token_type_ids": 0}
        batch = {
            name: pad_sequence(
                [torch.cat([items[i][name] for i in row]) for row in rows], batch_first=True, padding_value=padding
            )
            for name, padding in paddings.items()
        }
        numbers = [torch.tensor(row).add(1).repeat_interleave(of_row) for row, of_row in zip(rows, lengths)]
        batch["sample_idx"] = pad_sequence(numbers, batch_first=True)
        batch["is_video"] = torch.tensor([flag for item in items for flag in _is_video(item)], dtype=torch.bool)
        for names in MEDIA_INPUTS.values():
            batch |= _join_media([item for item in items if names[PIXELS] in item], names)
        skipped = {where: reason for item in items for where, reason in item["skipped"].items()}
        return batch | {"where": [item["where"] for item in items], "skipped": skipped}

    def _make_rows(self, lengths: list[int]) -> list[list[int]]:
        """Which samples share a row."""
        if not self.pack:
            return [[i] for i in range(len(lengths))]
        plan = plan_bins(lengths, max(lengths))
        return [[i for i, row in enumerate(plan.bin_idx) if row == bin_idx] for bin_idx in range(plan.num_bins)]


def _is_video(item: dict[str, Any]) -> list[bool]:
    return [kind == "video" for kind, names in MEDIA_INPUTS.items() for _ in item.get(names[GRIDS], ())]


def _join_media(items: list[dict[str, Any]], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Puts the videos, or the images, of several samples behind each other; windows name patches of all of them."""
    if not items:
        return {}
    num_patches = [item[names[PIXELS]].shape[:2].numel() for item in items]
    first_patch = torch.tensor([0, *num_patches[:-1]]).cumsum(0)
    pooling = [
        torch.where(item[names[POOLING]] < 0, -1, item[names[POOLING]] + first)
        for item, first in zip(items, first_patch)
    ]
    joined = {names[key]: torch.cat([item[names[key]] for item in items]) for key in (PIXELS, GRIDS)}
    return joined | {names[POOLING]: torch.cat(pooling)}
