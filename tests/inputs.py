"""Models and inputs that several test files need."""

import torch

from hub_upload.tiny import tiny_config, tiny_model, tiny_processor


NUM_PATCHES, NUM_WINDOWS = 729, 81
PLACEHOLDER = tiny_config().image_patch_id
PAD = 256  # the tiny tokenizer's <|endoftext|>


def lively_model(weight_seed=0, **stts):
    """The tiny model with weights large enough that every token changes the answer, and no end of sequence."""
    return enliven(tiny_model(**stts), weight_seed)


def enliven(model, weight_seed=0):
    generator = torch.Generator().manual_seed(weight_seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.2 * parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model


def video_inputs(num_frames=(4,), side="left", seed=0):
    """One random video and prompt a row, as the processor lays them out, with texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    videos = [torch.randint(0, 256, (n, 3, 54, 54), generator=generator, dtype=torch.uint8) for n in num_frames]
    inputs = dict(tiny_processor(tiny_config()).video_processor(videos, do_sample_frames=False, return_tensors="pt"))
    rows = []
    for row, frames in enumerate(num_frames):
        video = [token for i in range(frames) for token in [10 + i, 6, *[PLACEHOLDER] * NUM_WINDOWS, 7]]
        rows.append([5, *video, *torch.randint(20, 200, (4 + 3 * row,), generator=generator).tolist()])
    length = max(len(row) for row in rows)
    padded = [
        [PAD] * (length - len(row)) + row if side == "left" else row + [PAD] * (length - len(row)) for row in rows
    ]
    inputs["input_ids"] = torch.tensor(padded)
    inputs["attention_mask"] = (inputs["input_ids"] != PAD).long()
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == PLACEHOLDER).long()
    return inputs


def row_of(inputs, row):
    """One row of a batch without its padding, and its video, as if it had been processed alone."""
    real = inputs["attention_mask"][row].bool()
    frames = inputs["video_grids"][:, 0].tolist()
    start, stop = sum(frames[:row]), sum(frames[: row + 1])
    pooling = inputs["video_token_pooling"][start * NUM_WINDOWS : stop * NUM_WINDOWS] - start * NUM_PATCHES
    return {
        **{name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask", "mm_token_type_ids")},
        "pixel_values_videos": inputs["pixel_values_videos"][start:stop],
        "video_token_pooling": pooling,
        "video_grids": inputs["video_grids"][row : row + 1],
    }
