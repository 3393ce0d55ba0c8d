"""The hub folder as a stranger meets it: a fresh process, an empty modules cache, no package, no network."""

import json
import os
import subprocess
import sys

import pytest


def run_in_fresh_process(tmp_path, script, *args, block_package=True, **environment):
    """Runs a script that knows nothing of this package; returns what it printed as JSON."""
    blocker = "import sys; sys.modules['modeling_stts'] = None\n" if block_package else ""
    env = dict(
        os.environ,
        HF_MODULES_CACHE=str(tmp_path / "modules"),
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "home"),
        **environment,
    )
    command = [sys.executable, "-W", "error::UserWarning:__main__", "-c", blocker + script, *map(str, args)]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


ASK = """
import json, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers import AutoProcessor, AutoVideoProcessor, pipeline

clip, *folders = sys.argv[1:]
trust = {"trust_remote_code": True}


def ask(folder):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    content = [{"type": "video", "path": clip}, {"type": "text", "text": "What happens?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = inputs["input_ids"].shape[1]
    answers = {}
    for ratio in (None, 0.0, 0.8):
        kwargs = {} if ratio is None else {"prune_ratio": ratio}
        with torch.no_grad():
            logits = model(**inputs, **kwargs).logits
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, **kwargs)
        begins_with_prompt = torch.equal(out[:, :length], inputs["input_ids"])
        answers[str(ratio)] = [logits.shape[1], out.shape[1] - length, begins_with_prompt]
    classes = [
        type(AutoConfig.from_pretrained(folder, **trust)).__name__,
        type(AutoModel.from_pretrained(folder, **trust)).__name__,
        type(AutoModelForMultimodalLM.from_pretrained(folder, **trust)).__name__,
        type(AutoVideoProcessor.from_pretrained(folder, **trust)).__name__,
        type(processor).__name__,
        type(processor.video_processor).__name__,
    ]
    pipe = pipeline("video-text-to-text", model=folder, **trust)
    with open(clip, "rb") as file:
        texts = [
            pipe(video, text="What happens?", max_new_tokens=4, do_sample=False, prune_ratio=0.8)[0]["generated_text"]
            for video in (clip, file, file.read())
        ]
    pipe.model.config.to_json_string()
    frames = torch.zeros(6, 54, 54, 3, dtype=torch.uint8).numpy()
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    still = processor(text=text, videos=[frames], do_sample_frames=False, return_tensors="pt")
    tokens = model.generate(**still, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return {
        "length": length,
        "answers": answers,
        "classes": classes,
        "texts": texts,
        "from_frames": tokens.shape[1] - still["input_ids"].shape[1],
        "module": type(model).__module__.split(".")[0],
        "bias": model.model.vision_tower.scorer.mlp.fc3.bias.item(),
        "problems": [*map(sorted, map(info.get, info))],
    }


print(json.dumps([ask(folder) for folder in folders]))
"""


def test_loads_from_a_hub_folder_in_a_fresh_process(tiny_folder, clip, tmp_path):
    (answer,), _ = run_in_fresh_process(tmp_path, ASK, clip, tiny_folder)
    assert answer["module"] == "transformers_modules"
    # 8 of the 20 frames; half of 8 x 81 windows go, or four fifths.
    length = answer["length"]
    assert answer["answers"] == {
        "None": [length - 324, 4, True],
        "0.0": [length, 4, True],
        "0.8": [length - 518, 4, True],
    }
    assert answer["classes"] == [
        "Molmo2SttsConfig",
        "Molmo2SttsModel",
        "Molmo2SttsForConditionalGeneration",
        "Molmo2SttsVideoProcessor",
        "Molmo2SttsProcessor",
        "Molmo2SttsVideoProcessor",
    ]
    # The processor and its video processor come from two copies of the folder's code.
    assert len(answer["texts"]) == 3 and len(set(answer["texts"])) == 1
    assert answer["from_frames"] == 3


TUNE = """
import json, sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, by_parts, by_pipeline = sys.argv[1:4]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    model.model.vision_tower.scorer.mlp.fc3.bias += 1
model.save_pretrained(by_parts)
AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(by_parts)
pipe = pipeline("video-text-to-text", model=folder, trust_remote_code=True)
pipe.model.load_state_dict(model.state_dict())
pipe.save_pretrained(by_pipeline)
print(json.dumps(model.model.vision_tower.scorer.mlp.fc3.bias.item()))
"""


def test_resaved_checkpoint_still_loads_with_pipeline(tiny_folder, clip, tmp_path):
    folders = tmp_path / "by_parts", tmp_path / "by_pipeline"
    bias, _ = run_in_fresh_process(tmp_path, TUNE, tiny_folder, *folders)
    for folder in folders:
        assert {path.name for path in tiny_folder.glob("*")} <= {path.name for path in folder.glob("*")}
    (tmp_path / "second").mkdir()
    moved = [folder.rename(tmp_path / "second" / folder.name) for folder in folders]
    answers, _ = run_in_fresh_process(tmp_path / "second", ASK, clip, *moved)
    for answer in answers:
        assert answer["answers"]["0.8"][2] is True
        assert answer["bias"] == bias and not any(answer["problems"])


INSTALLED = """
import json, sys
import modeling_stts
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, clip = sys.argv[1:3]
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
pipe = pipeline("video-text-to-text", model=folder)
text = pipe(clip, text="What happens?", max_new_tokens=4)[0]["generated_text"]
modules = [type(thing).__module__ for thing in (model, processor, processor.video_processor, pipe, pipe.model)]
print(json.dumps([modules, text]))
"""


def test_works_with_the_package_installed_and_no_trust(tiny_folder, clip, tmp_path):
    (modules, text), _ = run_in_fresh_process(tmp_path, INSTALLED, tiny_folder, clip, block_package=False)
    assert all(module.startswith("modeling_stts.") for module in modules), modules
    assert isinstance(text, str)


FORGOTTEN = """
import json, sys
from transformers import AutoModelForImageTextToText

try:
    AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    print(json.dumps(str(error)))
"""


def test_trust_remote_code_forgotten_is_refused_not_silently_unpruned(tiny_folder, tmp_path):
    message, _ = run_in_fresh_process(tmp_path, FORGOTTEN, tiny_folder)
    assert "trust_remote_code=True" in message


@pytest.mark.parametrize("position_ids", ["compact"])
def test_settings_can_be_changed_at_load(tiny_folder, tmp_path, position_ids):
    script = """
import json, sys
from transformers import AutoConfig, AutoModelForImageTextToText

config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
config.stts_config.prune_ratio, config.stts_config.position_ids = 0.7, sys.argv[2]
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], config=config, trust_remote_code=True)
stts = model.model.config.stts_config
print(json.dumps([stts is model.config.stts_config, stts.prune_ratio, stts.position_ids]))
"""
    assert run_in_fresh_process(tmp_path, script, tiny_folder, position_ids)[0] == [True, 0.7, position_ids]
