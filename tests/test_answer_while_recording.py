import re
import sys
import threading
import time

import numpy as np
import pytest
import torch
from answer_while_recording import LastMinutes, main
from clips import number_image, write_clip
from growing_video import TimedFrame
from inputs import lively_model
from transformers.video_utils import VideoMetadata

from hub_upload.tiny import tiny_config, tiny_processor


QUESTION = "What happens?"
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def frames(start, stop, fps=2):
    return [TimedFrame(number / fps, number_image(number)) for number in range(start, stop)]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_config())


def test_one_chunk_equals_a_video_that_is_complete(processor):
    model, images = lively_model(), np.stack([number_image(number) for number in range(6)])
    minutes = LastMinutes(model, processor, tokens_per_chunk=200, window=60)
    minutes.add(frames(0, 6))
    content = [{"type": "video", "video": images}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_sample_frames": False, "video_metadata": [metadata(6)]},
    )
    prompt = minutes.prompt(QUESTION)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(prompt[name], inputs[name])
    # 200 of 486 tokens.
    output = model.generate(**inputs, prune_ratio=286.5 / 486, **GREEDY)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert minutes.num_tokens == 200
    assert minutes.answer(QUESTION, **GREEDY) == expected


def metadata(num_frames):
    return VideoMetadata(total_num_frames=num_frames, fps=2.0, frames_indices=list(range(num_frames)))


def test_tokens_and_memory_are_bounded_over_a_long_recording(processor):
    minutes = LastMinutes(lively_model(), processor, tokens_per_chunk=100, window=6)
    lengths = []
    for start in range(0, 32, 4):
        minutes.add(frames(start, start + 4))
        lengths.append(
            (len(minutes.chunks), minutes.num_tokens, minutes.prompt(QUESTION)["input_ids"].shape[1] // 100)
        )
    # Every chunk of two seconds has 100 tokens, and the window reaches into four of them.
    assert lengths[:3] == [(1, 100, 3), (2, 200, 7), (3, 300, 10)]
    assert set(lengths[4:]) == {(4, 400, 14)}
    assert minutes.chunks[0].times[0] == 8.0
    for chunk in minutes.chunks:
        assert chunk.features.pooler_output[0].untyped_storage().nbytes() == 100 * 32 * 4


def test_a_chunk_that_is_shorter_keeps_no_more(processor):
    minutes = LastMinutes(lively_model(), processor, tokens_per_chunk=100, window=60)
    for start, stop in ((0, 1), (1, 4), (4, 5), (5, 7)):
        minutes.add(frames(start, stop))
    assert [chunk.num_tokens for chunk in minutes.chunks] == [81, 100, 81, 100]


def run_script(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["answer_while_recording.py", *map(str, args)])
    main()


def test_the_script_answers_while_a_file_is_written(tiny_folder, tmp_path, monkeypatch, capsys):
    data = write_clip(tmp_path / "whole.ts", 48, fps=4).read_bytes()
    path = tmp_path / "recording.ts"

    def record():
        for start in range(0, len(data), len(data) // 20):
            with open(path, "ab") as file:
                file.write(data[start : start + len(data) // 20])
            time.sleep(0.05)

    writer = threading.Thread(target=record)
    writer.start()
    options = ("--every", 4, "--fps", 1, "--chunk-seconds", 2, "--window", 4, "--patience", 1)
    run_script(monkeypatch, path, "--model", tiny_folder, "--tokens-per-chunk", 90, *options)
    writer.join()
    rows = re.findall(r"^ +(\d+\.\d) s +(\d+) video tokens  ['\"]", capsys.readouterr().out, re.MULTILINE)
    assert [(float(seconds), int(tokens)) for seconds, tokens in rows] == [(5, 270), (9, 270), (11, 270)]


def test_a_recording_that_does_not_come_is_one_line(tiny_folder, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: .*none\.ts did not appear within 0\.1 seconds\.$"):
        run_script(monkeypatch, tmp_path / "none.ts", "--model", tiny_folder, "--patience", 0.1)


@pytest.mark.parametrize(
    ("option", "message"),
    [("--chunk-seconds", "must have more than 0 seconds"), ("--tokens-per-chunk", "must keep at least 1 token")],
)
def test_chunks_of_nothing_are_one_line(tiny_folder, tmp_path, monkeypatch, option, message):
    path = write_clip(tmp_path / "whole.ts", 4, fps=4)
    with pytest.raises(SystemExit, match=f"^error: .*{message}, got 0"):
        run_script(monkeypatch, path, "--model", tiny_folder, "--patience", 0.1, option, 0)
