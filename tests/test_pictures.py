import torch
from conversations import render_inputs
from model import make_model, make_processor, make_tokenizer
from pictures import NUM_DIGITS, PictureLearner, Pictures
from render import Renderer
from torch.nn import functional as F


def test_what_a_picture_learner_minimises():
    processor = make_processor(make_tokenizer())
    model = make_model(processor.tokenizer, seed=0)
    learner = PictureLearner(model)
    item = Pictures(processor, num_batches=10, seed=0, frames_per_batch=3)[9]
    inputs = render_inputs(item.pop("layout"), Renderer("train"), item.pop("seed"))
    item.pop("name")
    outputs = learner(**item, **inputs)
    hidden = model.model.vision_tower(inputs["pixel_values_videos"], output_hidden_states=True).hidden_states
    windows = torch.cat([hidden[8], hidden[6]], dim=-1).flatten(0, 1)[inputs["video_token_pooling"]].mean(1)
    digits, colours = learner.head(windows).split([NUM_DIGITS, 7], dim=-1)
    text = {name: item[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels")}
    expected = (
        F.cross_entropy(digits, item["window_labels"][..., 0].flatten())
        + F.cross_entropy(colours, item["window_labels"][..., 1].flatten())
        + model(**text, **inputs, prune_ratio=0.0).loss
    )
    torch.testing.assert_close(outputs.loss, expected)


def test_pictures_grow_from_two_digits_to_six():
    processor = make_processor(make_tokenizer())
    batches = Pictures(processor, num_batches=40, seed=0, frames_per_batch=40)
    most = [int((batches[i]["layout"].visible.sum((1, 2)) - 1).max()) for i in (0, 39)]
    assert most[0] <= 2 and most[1] == 6
