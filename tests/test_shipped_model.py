"""The trained model in examples/moving_digits/model, as a user meets it."""

import json
from pathlib import Path

import pytest
import ship
from benchmark import write_video
from report import Results
from scenes import describe, draw_scene
from ship import FOLDER, RESULTS, card_results
from test_remote_code import run_in_fresh_process

from hub_upload.check import CheckReport, Finding
from hub_upload.folder import file_hashes, list_files


ASK = """
import json, sys
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, asked = sys.argv[1], json.loads(sys.argv[2])
trust = {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
pipe = pipeline("video-text-to-text", model=folder, **trust)
greedy = {"max_new_tokens": 40, "do_sample": False}
answers = []
for path, text in asked:
    content = [{"type": "video", "path": path}, {"type": "text", "text": text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    for ratio in (0.0, 0.5):
        output = model.generate(**inputs, **greedy, prune_ratio=ratio)
        answers.append(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
        answers.append(pipe(path, text=text, prune_ratio=ratio, return_full_text=False, **greedy)[0]["generated_text"])
print(json.dumps(answers))
"""


def test_answers_fixed_videos_rightly(tmp_path):
    asked, right = [], []
    for seed, text, answer in [
        (5, "Which digit is white?", "4"),
        (7, "How many digits appear?", "2"),
        (8, "What colour is the 5?", "red"),
        (3, "What happens in this video?", describe(draw_scene("short", "test", 3)).answer),
    ]:
        path = tmp_path / f"{seed}.mp4"
        write_video(path, draw_scene("short", "test", seed), "test")
        asked.append((str(path), text))
        right += [answer] * 4
    answers, _ = run_in_fresh_process(tmp_path, ASK, FOLDER, json.dumps(asked))
    assert answers == right


def test_it_is_what_the_package_builds_today(tmp_path, monkeypatch):
    monkeypatch.setattr(ship, "check", lambda folder: CheckReport("", "", []))
    ship.make_folder(FOLDER, tmp_path / "model")
    built, shipped = file_hashes(tmp_path / "model"), file_hashes(FOLDER)
    assert built.keys() == shipped.keys()
    # The JSON files name the version of transformers that wrote them.
    stale = {name for name in built if built[name] != shipped[name] and not name.endswith(".json")}
    assert not stale, "run: python examples/moving_digits/ship.py"


def test_a_model_that_check_refuses_does_not_replace_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ship, "check", lambda folder: CheckReport("", "", [Finding("code", False, "is odd")]))
    with pytest.raises(ValueError, match="FAIL  code: is odd"):
        ship.make_folder(FOLDER, tmp_path / "model")


def test_it_is_small():
    sizes = [path.stat().st_size for path in list_files(FOLDER)]
    assert max(sizes) <= 15e6 and sum(sizes) <= 32e6


@pytest.mark.parametrize("name", ["short", "long", "detail"])
def test_its_card_says_what_was_measured(name):
    results = card_results(Results(json.loads((RESULTS / "stts-1.json").read_text())), name)
    assert [row["prune_ratio"] for row in results["rows"]] == [0.0, 0.3, 0.5, 0.7, 0.8, 0.9]
    card = Path(FOLDER, "README.md").read_text()
    assert all(f"{100 * row['accuracy']:.1f} %" in card for row in results["rows"])
