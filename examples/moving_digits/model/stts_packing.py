"""How the kept patches of a batch of frames stand in the ViT's later blocks, so that a patch sees its own frame only.

Two ways, equal in their results: one flat sequence for variable-length attention, or bins (rows of a frame's size,
filled first-fit-decreasing) with a block-diagonal mask for devices without it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from .stts_selection import kept_window_idx


class BinPlan(NamedTuple):
    """
    Where each frame stands.

    bin_idx (`list[int]`): bin of each frame, -1 for a frame without windows.
    start (`list[int]`): first slot of each frame in its bin.
    num_bins (`int`): bins in use.
    """

    bin_idx: list[int]
    start: list[int]
    num_bins: int

    @property
    def is_alone(self) -> list[bool]:
        """Whether a frame has its bin to itself."""
        frames_in_bin = np.bincount([idx for idx in self.bin_idx if idx >= 0], minlength=1)
        return [idx >= 0 and frames_in_bin[idx] == 1 for idx in self.bin_idx]


def plan_bins(lengths: list[int], bin_size: int) -> BinPlan:
    """
    First-fit-decreasing: the longest frame first (of equal ones the earlier), each into the first bin with room.

    Args:
        lengths (`list[int]`): length of each frame, at most `bin_size`; 0 = stands nowhere.
        bin_size (`int`): slots of a bin, in the unit of the lengths.

    Returns:
        `BinPlan`
    """
    room = np.full(len(lengths), bin_size)
    bin_idx, start = [-1] * len(lengths), [0] * len(lengths)
    for frame in sorted(range(len(lengths)), key=lambda frame: -lengths[frame]):
        if lengths[frame] > 0:
            first_fit = int((room >= lengths[frame]).argmax())
            bin_idx[frame], start[frame] = first_fit, int(bin_size - room[first_fit])
            room[first_fit] -= lengths[frame]
    return BinPlan(bin_idx, start, max(bin_idx, default=-1) + 1)


class Packing(NamedTuple):
    """
    The patches that take part in the later blocks and how they attend. Made by `pack_windows`.

    packed_window_idx (`torch.Tensor` of shape `(num_packed,)`, int64): windows that take part, into all windows.
    kept_row_idx (`torch.Tensor` of shape `(num_kept,)`, int64): which of those are kept afterwards; `None` = all.
    cu_seqlens (`torch.Tensor` of shape `(num_frames + 1,)`, int32): segment starts in patches; `None` with bins.
    slot_idx (`torch.Tensor` of shape `(num_packed,)`, int64): each window's slot in the bins; `None` without bins.
    attention_mask (`torch.Tensor` of shape `(num_bins, 1, bin_size, bin_size)`, bool): block-diagonal; `None`
        without bins.
    """

    packed_window_idx: torch.Tensor
    kept_row_idx: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    slot_idx: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None

    @property
    def kept_idx(self) -> torch.Tensor:
        """The kept windows, into all windows."""
        return self.packed_window_idx if self.kept_row_idx is None else self.packed_window_idx[self.kept_row_idx]

    def pack(self, windows: torch.Tensor) -> torch.Tensor:
        """
        Args:
            windows (`torch.Tensor` of shape `(num_all_windows, num_patches, hidden_size)`): every window.

        Returns:
            `torch.Tensor` of shape `(1, num_packed * num_patches, hidden_size)`, or
            `(num_bins, bin_size, hidden_size)` with zeros in the unused slots.
        """
        packed = windows[self.packed_window_idx.to(windows.device)]
        if self.slot_idx is None:
            return packed.flatten(0, 1)[None]
        num_bins, _, bin_size, _ = self.attention_mask.shape
        bins = packed.new_zeros(num_bins * bin_size // windows.shape[1], *windows.shape[1:])
        return bins.index_copy(0, self.slot_idx.to(windows.device), packed).view(num_bins, bin_size, -1)

    def unpack(self, hidden_states: torch.Tensor, num_patches: int) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): what `pack` returned, after any block.
            num_patches (`int`): patches of a window.

        Returns:
            `torch.Tensor` of shape `(num_kept, num_patches, hidden_size)`: the kept windows.
        """
        rows = hidden_states.reshape(-1, num_patches, hidden_states.shape[-1])
        for idx in (self.slot_idx, self.kept_row_idx):
            rows = rows if idx is None else rows[idx.to(rows.device)]
        return rows

    def take_kept(self, windows: torch.Tensor) -> torch.Tensor:
        """
        Args:
            windows (`torch.Tensor` of shape `(num_all_windows, num_patches, hidden_size)`): every window.

        Returns:
            `torch.Tensor` of shape `(num_kept, num_patches, hidden_size)`: the kept windows.
        """
        return windows[self.kept_idx.to(windows.device)]


def pack_windows(
    keep_mask: torch.Tensor,
    num_kept: int,
    num_patches: int,
    refill: bool,
    in_segments: bool,
    chunk_frames: int | None = None,
) -> Iterator[Packing]:
    """
    Packs the kept windows of a batch of frames, a chunk of frames at a time.

    Args:
        keep_mask (`torch.Tensor` of shape `(num_frames, num_windows)`, bool): all frames of the batch, in order.
        num_kept (`int`): number of True in it.
        num_patches (`int`): patches of a window.
        refill (`bool`): whether the dropped windows of a frame that is alone in its bin take part, as in the
            reference. The bins of all frames together are then planned, whatever the chunks are.
        in_segments (`bool`): variable-length attention (no waiting for the device with one chunk and without refill)
            or bins.
        chunk_frames (`int`, *optional*): frames of a chunk; all by default.

    Yields:
        `Packing`: one a chunk, in order. Its indices count from the chunk's first window. A chunk of which nothing is
        kept has a packing of nothing.
    """
    takes_part = keep_mask | _is_alone(keep_mask) if refill else keep_mask
    size = len(keep_mask) if chunk_frames is None else chunk_frames
    chunks = list(zip(keep_mask.split(size), takes_part.split(size)))
    counts = [(num_kept, num_kept)]
    if refill or len(chunks) > 1:
        counts = torch.stack([torch.stack([mask.sum() for mask in masks]) for masks in chunks]).tolist()
    # One at a time: the masks of all bins together would take much memory.
    for masks, count in zip(chunks, counts):
        yield pack_chunk(*masks, *count, num_patches, in_segments)


def _is_alone(keep_mask: torch.Tensor) -> torch.Tensor:
    """Whether each frame has its bin to itself, of shape `(num_frames, 1)`."""
    plan = plan_bins(keep_mask.sum(1).tolist(), keep_mask.shape[1])
    return torch.tensor(plan.is_alone, device=keep_mask.device)[:, None]


def pack_chunk(
    keep_mask: torch.Tensor,
    takes_part: torch.Tensor,
    num_kept: int,
    num_packed: int,
    num_patches: int,
    in_segments: bool,
) -> Packing:
    packed_window_idx = kept_window_idx(takes_part, num_packed)
    kept_row_idx = None
    if num_packed > num_kept:
        kept_row_idx = kept_window_idx(keep_mask.flatten()[packed_window_idx], num_kept)
    starts = F.pad(takes_part.sum(1).cumsum(0), (1, 0))
    if in_segments:
        return Packing(packed_window_idx, kept_row_idx, cu_seqlens=(starts * num_patches).int())
    plan = plan_bins(takes_part.sum(1).tolist(), keep_mask.shape[1])
    slot_idx, attention_mask = _place_in_bins(packed_window_idx, starts, plan, keep_mask.shape[1], num_patches)
    return Packing(packed_window_idx, kept_row_idx, slot_idx=slot_idx, attention_mask=attention_mask)


def _place_in_bins(
    packed_window_idx: torch.Tensor, starts: torch.Tensor, plan: BinPlan, num_windows: int, num_patches: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slot of every packed window, and the mask that keeps frames of one bin apart."""
    device = packed_window_idx.device
    frame = packed_window_idx // num_windows
    rank_in_frame = torch.arange(len(frame), device=device) - starts[frame]
    first_slot = torch.tensor(plan.bin_idx, device=device) * num_windows + torch.tensor(plan.start, device=device)
    slot_idx = first_slot[frame] + rank_in_frame
    frame_of_slot = torch.full((plan.num_bins * num_windows,), -1, device=device).index_copy(0, slot_idx, frame)
    frame_of_query = frame_of_slot.view(plan.num_bins, 1, num_windows, 1)
    frame_of_key = frame_of_query.masked_fill(frame_of_query < 0, -2).mT
    same_frame = frame_of_query == frame_of_key
    return slot_idx, same_frame.repeat_interleave(num_patches, dim=3).repeat_interleave(num_patches, dim=2)
