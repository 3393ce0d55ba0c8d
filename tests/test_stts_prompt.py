import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_stts.stts_prompt import cut_prompt


P, PAD = 9, 0


def cut(rows, keep, num_untouched=0):
    ids = torch.tensor(rows)
    result = cut_prompt(ids == P, torch.tensor(keep, dtype=torch.bool), (ids != PAD).long(), num_untouched)
    return result, result.take(ids, PAD).tolist()


def test_dropped_placeholders_are_cut_out():
    result, ids = cut([[1, P, P, P, 2, P, 3]], [True, False, True, False])
    assert ids == [[1, P, P, 2, 3]]
    assert result.kept_token_idx.tolist() == [[0, 1, 3, 4, 6]]
    assert result.num_removed == 2


def test_rows_stay_padded_on_the_left_and_lose_needless_padding():
    result, ids = cut([[PAD, PAD, 1, P, P], [1, P, P, P, 2]], [True, True, False, False, True])
    assert ids == [[1, P, P], [1, P, 2]]
    assert cut([[PAD, 1, 2, P], [1, P, P, P]], [False, True, True, False])[1] == [[PAD, 1, 2], [1, P, P]]


def test_rows_stay_padded_on_the_right():
    result, ids = cut([[1, P, 2, PAD, PAD], [1, P, P, P, 2]], [False, True, True, False])
    assert ids == [[1, 2, PAD, PAD], [1, P, P, 2]]
    assert result.kept_token_idx.tolist() == [[0, 2, -1, -1], [0, 1, 2, 4]]


def test_a_kept_placeholder_survives_a_mask_that_hides_it():
    ids = torch.tensor([[P, P, 1, 2]])
    result = cut_prompt(ids == P, torch.tensor([True, False]), torch.tensor([[0, 0, 1, 1]]))
    assert result.take(ids, PAD).tolist() == [[P, 1, 2]]


def test_untouched_columns_keep_their_padding():
    assert cut([[PAD, PAD, 1, P, P]], [True, False], num_untouched=2)[1] == [[PAD, PAD, 1, P]]


def test_a_cut_can_be_extended_for_beams_and_a_second_turn():
    result, _ = cut([[PAD, 1, P], [1, P, P]], [True, True, False])
    longer = result.extend(num_rows=4, num_new=2)
    assert longer.kept_token_idx.tolist() == [[1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 3, 4]]
    assert longer.attention_mask.tolist() == [[0, 1, 1, 1, 1]] * 2 + [[1, 1, 1, 1, 1]] * 2


def test_embeddings_are_cut_too():
    result, _ = cut([[1, P, P]], [False, True])
    embeddings = torch.arange(6.0).view(1, 3, 2)
    assert result.take(embeddings, 0.0).tolist() == [[[0.0, 1.0], [4.0, 5.0]]]


@pytest.mark.parametrize(("num_keep", "found"), [(2, 3), (4, 3)])
def test_a_wrong_number_of_placeholders_is_refused(num_keep, found):
    with pytest.raises(ValueError, match=rf"hold {found} video tokens, but its videos have {num_keep} windows"):
        cut([[1, P, P, P]], [True] * num_keep)


@given(st.lists(st.lists(st.sampled_from([1, 2, P]), min_size=1, max_size=12), min_size=1, max_size=4), st.data())
def test_every_row_is_what_a_list_comprehension_gives(rows, data):
    length, side = max(map(len, rows)), data.draw(st.sampled_from(["left", "right"]))
    pads = [[PAD] * (length - len(row)) for row in rows]
    padded = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads)]
    count = sum(row.count(P) for row in rows)
    keep = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    flags = iter(keep)
    expected = [[token for token in row if token != P or next(flags)] for row in rows]
    _, ids = cut(padded, keep)
    assert [[token for token in row if token != PAD] for row in ids] == expected
    assert len(ids[0]) == max(map(len, expected))
