import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import attention_in_segments

from modeling_stts.stts_attention import attend_with_mask
from modeling_stts.stts_packing import pack_windows, plan_bins


@pytest.mark.parametrize(
    ("lengths", "bin_idx", "start", "is_alone"),
    [
        # 81 has no room for anybody; 50 and 31 share; 40 and 40 share; 10 goes to the first bin with room.
        ([31, 81, 40, 50, 40, 10], [1, 0, 2, 1, 2, 3], [50, 0, 0, 0, 40, 0], [False, True, False, False, False, True]),
        ([0, 30, 0], [-1, 0, -1], [0, 0, 0], [False, True, False]),
        ([20, 20, 20, 20], [0, 0, 0, 0], [0, 20, 40, 60], [False] * 4),
        ([], [], [], []),
    ],
)
def test_bins_are_filled_first_fit_decreasing(lengths, bin_idx, start, is_alone):
    plan = plan_bins(lengths, bin_size=81)
    assert (plan.bin_idx, plan.start, plan.is_alone) == (bin_idx, start, is_alone)
    assert plan.num_bins == max(bin_idx, default=-1) + 1


@given(st.lists(st.integers(0, 81), max_size=80))
def test_no_bin_overflows_and_no_slot_is_used_twice(lengths):
    plan = plan_bins(lengths, bin_size=81)
    used = set()
    for frame, length in enumerate(lengths):
        assert (plan.bin_idx[frame] == -1) == (length == 0)
        slots = {(plan.bin_idx[frame], plan.start[frame] + i) for i in range(length)}
        assert not slots & used and all(slot < 81 for _, slot in slots)
        used |= slots
    assert {bin_idx for bin_idx, _ in used} == set(range(plan.num_bins))


def keep_masks(max_frames=5):
    return st.integers(1, max_frames).flatmap(
        lambda frames: st.lists(
            st.lists(st.booleans(), min_size=4, max_size=4), min_size=frames, max_size=frames
        ).filter(lambda mask: any(map(any, mask)))
    )


@settings(deadline=None)
@given(keep_masks(), st.booleans(), st.booleans())
def test_unpacking_gives_the_kept_windows_back(mask, refill, in_segments):
    keep_mask = torch.tensor(mask)
    windows = torch.arange(keep_mask.numel() * 3 * 2.0).view(-1, 3, 2)
    [packing] = pack_windows(keep_mask, int(keep_mask.sum()), 3, refill, in_segments)
    assert torch.equal(packing.unpack(packing.pack(windows), 3), windows[keep_mask.flatten()])


@settings(deadline=None)
@given(keep_masks(), st.booleans())
def test_packed_equals_per_frame_attention(mask, refill):
    keep_mask, generator = torch.tensor(mask), torch.Generator().manual_seed(0)
    num_kept, windows = int(keep_mask.sum()), torch.randn(keep_mask.numel(), 3, 8, generator=generator)
    [bins] = pack_windows(keep_mask, num_kept, 3, refill, in_segments=False)
    [flat] = pack_windows(keep_mask, num_kept, 3, refill, in_segments=True)
    in_bins = bins.pack(windows)[:, None]
    in_bins = attend_with_mask(in_bins, in_bins, in_bins, bins.attention_mask)[:, 0]
    in_segments = flat.pack(windows)[:, None]
    lengths = flat.cu_seqlens.diff().tolist()
    in_segments = attention_in_segments(in_segments, in_segments, in_segments, lengths)[:, 0]
    torch.testing.assert_close(bins.unpack(in_bins, 3), flat.unpack(in_segments, 3))


def test_refill_brings_the_dropped_windows_of_a_lonely_frame():
    keep_mask = torch.tensor([[True, True, True, False], [True, False, False, False], [True, True, True, False]])
    [packing] = pack_windows(keep_mask, 7, 1, refill=True, in_segments=True)
    # Frames 0 and 1 share a bin of 4 windows; frame 2 is alone and complete again.
    assert packing.packed_window_idx.tolist() == [0, 1, 2, 4, 8, 9, 10, 11]
    assert packing.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert packing.kept_row_idx.tolist() == [0, 1, 2, 3, 4, 5, 6]


@settings(deadline=None)
@given(keep_masks(), st.integers(1, 6), st.booleans(), st.booleans())
def test_chunks_hold_what_one_packing_holds(mask, chunk_frames, refill, in_segments):
    keep_mask = torch.tensor(mask)
    num_kept, windows = int(keep_mask.sum()), torch.arange(keep_mask.numel() * 3 * 2.0).view(-1, 3, 2)
    [whole] = pack_windows(keep_mask, num_kept, 3, refill, in_segments=True)
    chunks = list(pack_windows(keep_mask, num_kept, 3, refill, in_segments, chunk_frames))
    starts = range(0, keep_mask.numel(), chunk_frames * keep_mask.shape[1])
    assert len(chunks) == len(starts)
    packed = torch.cat([chunk.packed_window_idx + start for chunk, start in zip(chunks, starts)])
    assert torch.equal(packed, whole.packed_window_idx)
    kept = [chunk.take_kept(part) for chunk, part in zip(chunks, windows.split(chunk_frames * keep_mask.shape[1]))]
    assert torch.equal(torch.cat(kept), windows[keep_mask.flatten()])
    if in_segments:
        lengths = torch.cat([chunk.cu_seqlens.diff() for chunk in chunks])
        assert torch.equal(lengths, whole.cu_seqlens.diff())
