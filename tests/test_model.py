import pytest
import torch
from model import make_config, make_model, make_processor, make_tokenizer
from scenes import COLOURS, DIRECTIONS, PLACES

from hub_upload.tiny import ADDITIONAL_TOKENS, TEXT_TOKENS


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_size(tokenizer):
    model = make_model(tokenizer, seed=0)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters <= 16e6
    assert 2 * num_parameters <= 32e6


def test_the_same_seed_gives_the_same_weights_and_another_others(tokenizer):
    first, again, other = (make_model(tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_tokenizer_is_the_same_each_time_and_keeps_every_text(tokenizer):
    assert make_tokenizer().get_vocab() == tokenizer.get_vocab()
    for text in ("Where does the 7 appear?", "What is that? Ça va, 你好!\n\t~", "0.5 12.0"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert max(ids) < make_config(tokenizer).text_config.vocab_size


def test_answers_are_one_token_or_a_few(tokenizer):
    answers = [*COLOURS, *DIRECTIONS, *map(str, range(15))]
    assert all(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) == 1 for answer in answers)
    assert all(len(tokenizer(place, add_special_tokens=False)["input_ids"]) <= 3 for place in PLACES)


def test_special_tokens_come_last_and_only_those_of_text_have_logits(tokenizer):
    config = make_config(tokenizer).text_config
    ids = tokenizer.convert_tokens_to_ids(TEXT_TOKENS + ADDITIONAL_TOKENS)
    assert ids == list(range(len(tokenizer) - len(ids), len(tokenizer)))
    assert config.vocab_size == ids[len(TEXT_TOKENS)]
    assert config.vocab_size + config.additional_vocab_size == len(tokenizer)


def test_windows_are_three_by_three_patches(tokenizer):
    frames = torch.zeros(2, 3, 200, 300, dtype=torch.uint8)
    inputs = make_processor(tokenizer).video_processor([frames], do_sample_frames=False, return_tensors="pt")
    assert inputs["video_grids"].tolist() == [[2, 6, 6]]
    assert inputs["video_token_pooling"].shape == (72, 9)
    assert inputs["video_token_pooling"][1].tolist() == [3, 4, 5, 21, 22, 23, 39, 40, 41]
