import pytest
import torch
from finetuning.collator import MEDIA_INPUTS, Collator
from finetuning.samples import read_samples
from hypothesis import given
from hypothesis import strategies as st
from training_inputs import encode_rows, training_processor, turns, write_mixed, write_rows, write_still


PAD = 256


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return write_mixed(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def items(mixed):
    return encode_rows(mixed)


def test_videos_are_joined_as_the_processor_joins_them(tmp_path):
    write_still(tmp_path / "long.mp4", 85, num_frames=8)
    write_still(tmp_path / "short.mp4", 15, num_frames=3)
    rows = [turns("Which?", "x", video=video) for video in ("short.mp4", "long.mp4")]
    path = write_rows(tmp_path / "data.jsonl", rows)
    batch = Collator(PAD)(encode_rows(path))
    expected = training_processor().apply_chat_template(
        [sample.messages for sample in read_samples(path)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding_side": "right"},
    )
    assert torch.equal(batch["sample_idx"] > 0, expected.pop("attention_mask").bool())
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name


@pytest.mark.parametrize("pack", [False, True])
def test_every_sample_is_in_the_batch_with_its_own_images_or_video(items, pack):
    batch = Collator(PAD, pack)(items)
    assert len(batch["input_ids"]) == (3 if pack else 4)
    by_name = {item["where"]: item for item in items}
    first_window = dict.fromkeys(MEDIA_INPUTS, 0)
    is_video = iter(batch["is_video"].tolist())
    for number, where in enumerate(batch["where"], start=1):
        item, is_own = by_name.pop(where), batch["sample_idx"] == number
        assert is_own.any(1).sum() == 1
        for name in ("input_ids", "labels", "mm_token_type_ids"):
            assert batch[name][is_own].tolist() == item[name].tolist()
        for kind, names in MEDIA_INPUTS.items():
            if names["pixels"] in item:
                assert all(next(is_video) == (kind == "video") for _ in item[names["grids"]])
                num_windows = len(item[names["pooling"]])
                expected = window_pixels(item[names["pixels"]], item[names["pooling"]])
                idx = batch[names["pooling"]][first_window[kind] :][:num_windows]
                assert torch.equal(window_pixels(batch[names["pixels"]], idx), expected)
                first_window[kind] += num_windows
    assert by_name == {} and next(is_video, None) is None


def window_pixels(pixels, idx):
    return pixels.flatten(0, 1)[idx.clamp(min=0)].masked_fill((idx < 0)[..., None], 0)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_packing_needs_no_longer_row_and_no_more_rows(lengths):
    items = [
        {
            **{name: torch.full((length,), i) for name in ("input_ids", "labels", "mm_token_type_ids")},
            "where": str(i),
            "skipped": {},
        }
        for i, length in enumerate(lengths)
    ]
    batch = Collator(PAD, pack=True)(items)
    rows, longest = batch["input_ids"].shape
    assert longest == max(lengths) and rows <= len(lengths)
    for number, where in enumerate(batch["where"], start=1):
        assert batch["input_ids"][batch["sample_idx"] == number].tolist() == [int(where)] * lengths[int(where)]
    padding = batch["sample_idx"] == 0
    assert (batch["input_ids"][padding] == PAD).all() and (batch["labels"][padding] == -100).all()


def test_a_batch_names_its_samples_and_what_was_skipped(items):
    skipped = [items[0] | {"skipped": {"x:1": "broken"}}, items[1] | {"skipped": {"x:2": "cut off"}}]
    batch = Collator(PAD)(skipped)
    assert batch["where"] == [item["where"] for item in skipped]
    assert batch["skipped"] == {"x:1": "broken", "x:2": "cut off"}
