"""
What `check` runs in a fresh process: it loads and uses a hub folder as a stranger would, by the folder's own code.

It prints one JSON line for each step, with its name, whether it passed, and what is wrong or was seen. Nothing of this
project may be imported here.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    pipeline,
)
from transformers.utils import logging


TRUST = {"trust_remote_code": True}
QUESTION = "What happens?"
NUM_FRAMES, FRAME_SIDE, NUM_NEW_TOKENS, PRUNE_RATIO = 4, 64, 2, 0.5
OUR_FIELDS = ("model_type", "architectures", "auto_map", "custom_pipelines", "stts_config", "stts_release")
NETWORK_EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind")
PROCESS_EVENTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")


def forbid_network_and_processes() -> None:
    """Lets nothing in this process use the network, and lets no code of a hub folder start a process."""

    def hook(event: str, args: tuple) -> None:
        if event in NETWORK_EVENTS:
            raise PermissionError(f"the network was used: {event}")
        if event in PROCESS_EVENTS and _is_called_by_hub_code():
            raise PermissionError(f"a process was started: {event}")

    sys.addaudithook(hook)


def _is_called_by_hub_code() -> bool:
    # Other libraries may: some ask the system's own tools about the machine.
    return any("transformers_modules" in frame.filename for frame in traceback.extract_stack())


def _load(auto_class: type, folder: str) -> torch.nn.Module:
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **TRUST)
    # A model without head has no use for the head's weights.
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if auto_class is AutoModel:
        wrong.pop("unexpected_keys", None)
    if wrong:
        raise ValueError(f"loading reports {wrong}")
    return model.eval()


def _logits(model: torch.nn.Module, inputs: dict, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def load_config(state: SimpleNamespace) -> str:
    state.config = AutoConfig.from_pretrained(state.folder, **TRUST)
    return type(state.config).__name__


def load_base_model(state: SimpleNamespace) -> str:
    return type(_load(AutoModel, state.folder)).__name__


def load_multimodal_model(state: SimpleNamespace) -> str:
    return type(_load(AutoModelForMultimodalLM, state.folder)).__name__


def load_model(state: SimpleNamespace) -> str:
    state.model = _load(AutoModelForImageTextToText, state.folder)
    return f"{type(state.model).__name__} in {state.model.dtype}".replace("torch.", "")


def load_processor(state: SimpleNamespace) -> str:
    state.processor = AutoProcessor.from_pretrained(state.folder, **TRUST)
    return f"{type(state.processor).__name__} with {type(state.processor.video_processor).__name__}"


def run_a_video(state: SimpleNamespace) -> str:
    num_frames = state.config.stts_config.prune_from_frame + NUM_FRAMES
    state.video = np.random.default_rng(0).integers(0, 256, (num_frames, FRAME_SIDE, FRAME_SIDE, 3), dtype=np.uint8)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    text = state.processor.apply_chat_template(chat, add_generation_prompt=True)
    state.inputs = state.processor(text=text, videos=[state.video], do_sample_frames=False, return_tensors="pt")
    length = state.inputs["input_ids"].shape[1]
    kept = _logits(state.model, state.inputs, prune_ratio=PRUNE_RATIO).shape[1]
    output = state.model.generate(**state.inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
    if not (kept < length < output.shape[1]):
        raise ValueError(f"a prompt of {length} tokens was cut to {kept} and continued to {output.shape[1]}")
    return f"a prompt of {length} tokens was cut to {kept}"


def compare_with_native(state: SimpleNamespace) -> str:
    fields = {name: value for name, value in state.config.to_dict().items() if name not in OUR_FIELDS}
    native = Molmo2ForConditionalGeneration.from_pretrained(state.folder, config=Molmo2Config(**fields)).eval()
    state.unpruned = _logits(state.model, state.inputs, prune_ratio=0.0)
    if not torch.equal(state.unpruned, _logits(native, state.inputs)):
        raise ValueError("the logits at prune ratio 0 are not those of native Molmo2")
    return "the same logits, bit by bit"


def run_the_pipeline(state: SimpleNamespace) -> str:
    pipe = pipeline("video-text-to-text", model=state.folder, **TRUST)
    answer = pipe(
        state.video, text=QUESTION, max_new_tokens=NUM_NEW_TOKENS, processor_kwargs={"do_sample_frames": False}
    )
    if not isinstance(answer[0]["generated_text"], str):
        raise ValueError(f"it answered {answer!r}")
    return type(pipe).__name__


def save_and_load_again(state: SimpleNamespace) -> str:
    again = str(Path(state.scratch) / "again")
    state.model.save_pretrained(again)
    state.processor.save_pretrained(again)
    if not torch.equal(
        _logits(_load(AutoModelForImageTextToText, again), state.inputs, prune_ratio=0.0), state.unpruned
    ):
        raise ValueError("the logits changed")
    AutoProcessor.from_pretrained(again, **TRUST)
    return "the same logits, bit by bit"


STEPS: dict[str, Callable[[SimpleNamespace], str]] = {
    "AutoConfig": load_config,
    "AutoModel": load_base_model,
    "AutoModelForMultimodalLM": load_multimodal_model,
    "AutoModelForImageTextToText": load_model,
    "AutoProcessor": load_processor,
    "a tiny video": run_a_video,
    "ratio 0 equals native Molmo2": compare_with_native,
    "pipeline": run_the_pipeline,
    "saves and loads again": save_and_load_again,
}


def main(folder: str, scratch: str) -> None:
    """Runs all steps; one that needs the result of a failed one fails too."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    forbid_network_and_processes()
    state = SimpleNamespace(folder=folder, scratch=scratch)
    for name, step in STEPS.items():
        try:
            passed, message = True, step(state)
        except Exception as error:  # whatever a stranger would meet is what is asked for
            passed, message = False, " ".join(f"{type(error).__name__}: {error}".split())
        print(json.dumps({"name": name, "passed": passed, "message": message}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
