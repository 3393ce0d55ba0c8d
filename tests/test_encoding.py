import pytest
import torch
from finetuning.encoding import ConversationDataset, Encoder, find_answers
from finetuning.samples import Sample, read_samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_inputs import training_processor, turns, write_image, write_rows, write_still


@pytest.fixture(scope="module")
def processor():
    return training_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_still(folder / "good.mp4", 5)
    write_image(folder / "image.png")
    (folder / "bad.mp4").write_bytes(b"not a video")
    return folder


def dataset(folder, processor, *rows, on_bad_video="fail", max_length=None):
    samples = read_samples(write_rows(folder / "data.jsonl", rows))
    return ConversationDataset(samples, Encoder(processor, max_length), on_bad_video)


def naive_labels(processor, ids):
    """Token by token: what stands between the assistant's header and the end of the turn, end included."""
    header = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    labels, inside = [], False
    for i, token in enumerate(ids):
        inside = inside or ids[max(0, i - len(header)) : i] == header
        labels.append(token if inside else -100)
        inside = inside and token != end
    return labels


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=2, max_size=6))
def test_labels_stand_on_the_assistants_turns_alone(processor, texts):
    texts = texts[: len(texts) // 2 * 2]
    item = Encoder(processor, None)(Sample(turns(*texts)["messages"], "here"))
    assert item["labels"].tolist() == naive_labels(processor, item["input_ids"].tolist())


@pytest.mark.parametrize("media", [{"video": "good.mp4"}, {"image": "image.png"}, {}])
def test_inputs_are_those_of_the_processor(folder, processor, media):
    data = dataset(folder, processor, turns("What? é", " A cat ü. ", "And?", "Dog\n", **media))
    item, messages = data[0], data.samples[0].messages
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert item["input_ids"].tolist() == expected["input_ids"][0].tolist()
    assert item["labels"].tolist() == naive_labels(processor, item["input_ids"].tolist())
    assert item["mm_token_type_ids"].tolist() == expected["mm_token_type_ids"][0].tolist()
    for name in expected.keys() - {"input_ids", "mm_token_type_ids", "attention_mask"}:
        assert torch.equal(item[name], expected[name]), name


def test_a_video_of_a_later_turn_shifts_the_answers_behind_it_alone(folder, processor):
    row = turns("hi", "ho", "and this?", "a five")
    row["messages"][2]["content"] = [{"type": "video", "path": "good.mp4"}, {"type": "text", "text": "and this?"}]
    labels = dataset(folder, processor, row)[0]["labels"]
    assert processor.decode(labels[labels != -100]) == "ho<|im_end|>a five<|im_end|>"


def test_a_template_that_writes_earlier_turns_otherwise_is_refused(folder, processor):
    template = "{% for m in messages %}{{ loop.length }}{{ m['role'] }}{{ m['content'] }}{% endfor %}"
    other = training_processor()
    other.chat_template = template
    with pytest.raises(ValueError, match="message 1 of the conversation"):
        find_answers(other, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_a_text_that_holds_a_placeholder_is_refused(folder, processor):
    with pytest.raises(ValueError, match=r"data\.jsonl:1: the chat template writes 2 placeholders"):
        dataset(folder, processor, turns("<|video|>", "b", video="good.mp4"))[0]


def test_a_sample_longer_than_the_positions_is_refused(folder, processor):
    assert len(dataset(folder, processor, turns("a", "b", video="good.mp4"), max_length=200)[0]["input_ids"]) < 200
    with pytest.raises(ValueError, match=r"data\.jsonl:1: the sample takes \d+ positions, .* has 20\."):
        dataset(folder, processor, turns("a", "b", video="good.mp4"), max_length=20)[0]


@pytest.mark.parametrize("path", ["bad.mp4", "missing.mp4"])
def test_a_video_that_cannot_be_decoded_is_fatal_by_default(folder, processor, path):
    with pytest.raises(ValueError, match=rf"data\.jsonl:2: .*{path}"):
        dataset(folder, processor, turns("a", "b"), turns("a", "b", video=path))[1]


def test_a_skipped_sample_is_named_and_the_next_good_one_is_in_its_place(folder, processor):
    rows = [turns("a", "b"), turns("c", "d", video="bad.mp4"), turns("e", "f", image="bad.mp4")]
    data = dataset(folder, processor, *rows, on_bad_video="skip")
    assert [data[i]["where"][-2:] for i in range(3)] == [":1", ":1", ":1"]
    assert data[0]["skipped"] == {}
    assert [where[-2:] for where in data[1]["skipped"]] == [":2", ":3"]
    assert all("bad.mp4" in reason for reason in data[1]["skipped"].values())


def test_nothing_but_bad_videos_is_fatal(folder, processor):
    data = dataset(folder, processor, *[turns("a", "b", video="bad.mp4")] * 2, on_bad_video="skip")
    with pytest.raises(ValueError, match="none of the 2 samples can be decoded"):
        data[1]


def test_what_to_do_about_bad_videos_is_checked(processor):
    with pytest.raises(ValueError, match="`on_bad_video` must be one of"):
        ConversationDataset([], Encoder(processor, None), "ignore")
