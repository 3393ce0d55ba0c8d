"""Models with random weights and prompts of several sizes: Molmo2-4B, and one that two CPU cores can run."""

import torch
from transformers import Molmo2Config, Molmo2ForConditionalGeneration

from modeling_stts import Molmo2SttsConfig, Molmo2SttsForConditionalGeneration
from modeling_stts.stts_two_pass import IMPLEMENTATION as TWO_PASS


POOLED = 3  # patches: the side of a window
NUM_QUESTION_TOKENS = 20
ROPE = {"rope_type": "default", "rope_theta": 1e6}
SIZES = {
    "4b": {
        "adapter_config": {"text_hidden_size": 2560, "intermediate_size": 9728},
        "text_config": {
            "hidden_size": 2560,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "max_position_embeddings": 131072,
            "rope_parameters": ROPE,
        },
    },
    # The proportions of the 4b: blocks in which every product has hundreds of rows and columns, so that time follows
    # the number of operations.
    "cpu": {
        "vision_config": {
            "hidden_size": 288,
            "intermediate_size": 1076,
            "num_hidden_layers": 13,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        "adapter_config": {
            "vision_feature_layer": [12, 9],
            "hidden_size": 288,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 1216,
            "text_hidden_size": 384,
        },
        "text_config": {
            "hidden_size": 384,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 1216,
            "num_hidden_layers": 12,
            "max_position_embeddings": 131072,
            "vocab_size": 512,
            "rope_parameters": ROPE,
        },
        "image_patch_id": 514,
        "frame_start_token_id": 515,
        "frame_end_token_id": 516,
    },
}


def build_models(
    size: str, device: torch.device, dtype: torch.dtype
) -> tuple[Molmo2ForConditionalGeneration, Molmo2SttsForConditionalGeneration]:
    """
    Native Molmo2 and Molmo2 with STTS, which share their random weights, so that there is room for both.

    Args:
        size (`str`): a key of `SIZES`.
        device (`torch.device`), dtype (`torch.dtype`): of the weights.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        stts = Molmo2SttsForConditionalGeneration(Molmo2SttsConfig(**SIZES[size])).eval()
        stts.set_attn_implementation({"text_config": TWO_PASS})
    with torch.device("meta"):
        native = Molmo2ForConditionalGeneration(Molmo2Config(**SIZES[size])).eval()
    torch.set_default_dtype(default)
    native.load_state_dict(stts.state_dict(keep_vars=True), strict=False, assign=True)
    for name, buffer in stts.named_buffers():
        parent, _, last = name.rpartition(".")
        setattr(native.get_submodule(parent), last, buffer)
    return native, stts


def make_inputs(
    config: Molmo2Config, num_frames: int, batch_size: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """
    Prompts as the processor lays them out: for each frame a timestamp and its tokens, and a question at the end.

    Args:
        config (`Molmo2Config`): of the model.
        num_frames (`int`): frames of the video of each prompt.
        batch_size (`int`): prompts.
        device (`torch.device`): of the inputs.
    """
    vision = config.vision_config
    side = vision.image_size[0] // vision.patch_size
    rows, num_patches = side // POOLED, side**2
    frame = [
        11,
        12,
        13,
        config.frame_start_token_id,
        *[config.image_patch_id] * rows**2,
        config.frame_end_token_id,
    ]
    ids = torch.tensor([[1, *frame * num_frames, *[20] * NUM_QUESTION_TOKENS]] * batch_size, device=device)
    image_token_ids = torch.tensor(frame[3:], device=device)
    windows = torch.arange(num_patches).view(rows, POOLED, rows, POOLED).permute(0, 2, 1, 3).reshape(rows**2, -1)
    frames = torch.arange(num_frames * batch_size).view(-1, 1, 1)
    generator = torch.Generator(device).manual_seed(0)
    shape = (num_frames * batch_size, num_patches, vision.patch_size**2 * 3)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.isin(ids, image_token_ids).long(),
        "pixel_values_videos": torch.randn(shape, generator=generator, device=device),
        "video_token_pooling": (frames * num_patches + windows).flatten(0, 1).to(device),
        "video_grids": torch.tensor([[num_frames, rows, rows]] * batch_size),
    }


def num_text_tokens(num_frames: int) -> int:
    """Tokens of a prompt of `make_inputs` that are not vision tokens."""
    return 1 + 5 * num_frames + NUM_QUESTION_TOKENS
