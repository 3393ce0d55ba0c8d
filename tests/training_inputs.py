"""A model that trains in seconds, and conversations about clips to train it on."""

import json

import av
import numpy as np
import torch
from clips import add_stream, number_image
from finetuning.encoding import ConversationDataset, Encoder
from finetuning.samples import read_samples
from inputs import enliven
from PIL import Image

from hub_upload.tiny import small_processor, tiny_config, tiny_tokenizer
from modeling_stts import Molmo2SttsConfig, Molmo2SttsForConditionalGeneration


SIDE = 18  # pixels: 9 x 9 patches, 3 x 3 windows a frame
NUM_WINDOWS, NUM_FRAMES = 9, 4


def small_config(**stts):
    """The tiny model's configuration, for frames of 9 windows."""
    fields = tiny_config(**stts).to_dict()
    fields["vision_config"] |= {"image_size": [SIDE, SIDE], "num_position_embeddings": 81}
    return Molmo2SttsConfig(**fields)


def training_model(**stts):
    """A model with large random weights."""
    torch.manual_seed(0)
    return enliven(Molmo2SttsForConditionalGeneration(small_config(**stts)))


def training_processor():
    return small_processor(small_config(), tiny_tokenizer(), NUM_FRAMES, max_fps=2)


def write_still(path, number, num_frames=8):
    """A clip at 4 frames a second that shows one number; every second frame is sampled."""
    with av.open(str(path), mode="w") as container:
        stream = add_stream(container, "mpeg4")
        for _ in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(number_image(number), format="rgb24")))
        container.mux(stream.encode())
    return path


def write_image(path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def turns(*texts, video=None, image=None):
    """A row of a JSONL file: questions and answers in turns, the first one about a video or images."""
    media = [{"type": "video", "path": video}] if video else []
    media += [{"type": "image", "path": image}] * 2 if image else []
    messages = [
        {"role": ("user", "assistant")[turn % 2], "content": [{"type": "text", "text": text}] if turn == 0 else text}
        for turn, text in enumerate(texts)
    ]
    messages[0]["content"] = media + messages[0]["content"]
    return {"messages": messages}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_mixed(folder):
    """Videos of different lengths, images and texts, with conversations of one turn and of several."""
    write_still(folder / "long.mp4", 85, num_frames=8)
    write_still(folder / "short.mp4", 15, num_frames=5)
    write_image(folder / "image.png")
    rows = [
        turns("What? é", " A cat ü.", "And?", "Dog\n", video="long.mp4"),
        turns("Which?", "x", video="short.mp4"),
        turns("Pictures?", "two", image="image.png"),
        turns("hi", "ho"),
    ]
    return write_rows(folder / "mixed.jsonl", rows)


def encode_rows(path):
    """Every sample of a file, encoded."""
    dataset = ConversationDataset(read_samples(path), Encoder(training_processor(), None))
    return [dataset[i] for i in range(len(dataset))]
