import json

import pytest
from finetuning.samples import read_samples
from training_inputs import turns, write_rows


def read_one(tmp_path, row):
    (sample,) = read_samples(write_rows(tmp_path / "data.jsonl", [row]))
    return sample


def test_paths_are_relative_to_the_file_absolute_or_addresses(tmp_path):
    rows = [turns("a", "b", video=path) for path in ("clips/a.mp4", "/data/a.mp4", "https://example.org/a.mp4")]
    samples = read_samples(write_rows(tmp_path / "data.jsonl", rows))
    expected = [str(tmp_path / "clips" / "a.mp4"), "/data/a.mp4", "https://example.org/a.mp4"]
    assert [sample.media("video") for sample in samples] == [[path] for path in expected]
    assert [sample.where for sample in samples] == [f"{tmp_path}/data.jsonl:{line}" for line in (1, 2, 3)]


@pytest.mark.parametrize("part", [{"path": "a.mp4"}, {"url": "a.mp4"}, {"video": "a.mp4"}, {}])
def test_files_are_named_in_the_part_or_beside_the_messages(tmp_path, part):
    row = turns("a", "b", video="?")
    row["messages"][0]["content"][0] = {"type": "video", **part}
    sample = read_one(tmp_path, row | ({} if part else {"videos": ["a.mp4"]}))
    assert sample.media("video") == [str(tmp_path / "a.mp4")]


def test_what_data_sets_leave_empty_is_left_out(tmp_path):
    row = turns("a", "b", video="?")
    row["messages"][0]["content"] = [
        {"type": "video", "path": None, "text": None, "video": "a.mp4"},
        {"type": "text", "text": "a", "video": None},
    ]
    sample = read_one(tmp_path, row | {"images": None, "videos": None})
    assert sample.messages[0]["content"][0] == {"type": "video", "path": str(tmp_path / "a.mp4")}


def test_empty_lines_are_left_out_and_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + json.dumps(turns("a", "b")) + "\n\n")
    assert [sample.where for sample in read_samples(path)] == [f"{path}:2"]


def with_content(content):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]}


VIDEO, IMAGE = {"type": "video", "path": "a.mp4"}, {"type": "image", "path": "a.png"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "object with a list `messages`"),
        ({"messages": "hello"}, "object with a list `messages`"),
        ({"messages": []}, "no turn of the assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must follow one of the user"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "got 'robot'"),
        (with_content(None), "a text or a list of parts"),
        (with_content([{"type": "audio", "path": "a.wav"}]), "audio"),
        (with_content([{"type": "text"}]), "with a `text`"),
        (with_content([{"type": "video"}]), 'must name its file by "path"'),
        (with_content([VIDEO, VIDEO]), "got 2 videos and 0 images"),
        (with_content([VIDEO, IMAGE]), "got 1 videos and 1 images"),
        (turns("a", "b") | {"videos": ["a.mp4"]}, "`videos` has more entries"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [VIDEO]}]},
            "must be text alone",
        ),
    ],
)
def test_a_line_that_is_no_conversation_to_learn_from_is_refused_by_number(tmp_path, row, message):
    path = write_rows(tmp_path / "data.jsonl", [turns("a", "b"), row])
    with pytest.raises(ValueError, match=message) as error:
        read_samples(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_broken_json_is_refused_by_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": [')
    with pytest.raises(ValueError, match=r"data\.jsonl:1: "):
        read_samples(path)


def test_a_file_without_samples_is_refused(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [])
    with pytest.raises(ValueError, match="has no samples"):
        read_samples(path)
    with pytest.raises(ValueError, match="cannot be read as a JSONL file"):
        read_samples(tmp_path / "missing.jsonl")
