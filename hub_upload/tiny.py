"""A tiny Molmo2 with STTS and random weights: real window geometry, toy sizes. For tests and for trying the tools."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, Molmo2ImageProcessor, PreTrainedTokenizerFast

from modeling_stts import (
    Molmo2SttsConfig,
    Molmo2SttsForConditionalGeneration,
    Molmo2SttsProcessor,
    Molmo2SttsVideoProcessor,
)


TEXT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# As in the released checkpoints, these come after the base vocabulary: they have embeddings, but no output logits.
ADDITIONAL_TOKENS = [
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<|image|>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
    "<|video|>",
]
# Which of them the configuration has to know.
TOKEN_FIELDS = {
    "image_start_token_id": "<im_start>",
    "low_res_image_start_token_id": "<low_res_im_start>",
    "image_end_token_id": "<im_end>",
    "image_patch_id": "<im_patch>",
    "frame_start_token_id": "<frame_start>",
    "frame_end_token_id": "<frame_end>",
}
MAX_LENGTH = 36864
NUM_BYTES = 256
VOCAB_SIZE = NUM_BYTES + len(TEXT_TOKENS)
FRAME_SIZE = {"height": 54, "width": 54}
PATCH_SIZE = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|video|>"
    "{% elif part['type'] == 'image' %}<|image|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _token_id(token: str) -> int:
    return NUM_BYTES + (TEXT_TOKENS + ADDITIONAL_TOKENS).index(token)


def tiny_config(**stts) -> Molmo2SttsConfig:
    """
    Configuration of the tiny model: 27 x 27 patches a frame pooled 3 x 3 to 81 windows, 8 ViT and 2 LLM layers.

    Args:
        stts: fields of `SttsConfig`, such as `prune_ratio` (fraction of a video's windows to remove).

    Raises:
        ValueError: if a field of `SttsConfig` is out of its range.
    """
    vit_shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    return Molmo2SttsConfig(
        vision_config={
            **vit_shape,
            "intermediate_size": 48,
            "num_hidden_layers": 8,
            "image_size": list(FRAME_SIZE.values()),
            "patch_size": PATCH_SIZE,
        },
        adapter_config={
            **vit_shape,
            "intermediate_size": 48,
            "vision_feature_layer": [7, 5],
            "text_hidden_size": 32,
        },
        text_config={
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "vocab_size": VOCAB_SIZE,
            "additional_vocab_size": len(ADDITIONAL_TOKENS),
            "max_position_embeddings": MAX_LENGTH,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        **{field: _token_id(token) for field, token in TOKEN_FIELDS.items()},
        stts_config=stts,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with one token a byte and Molmo2's special tokens; pads on the left."""
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return finish_tokenizer(tokenizer)


def finish_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """
    Gives a byte-level tokenizer Molmo2's special tokens, which come last, and padding on the left.

    Args:
        tokenizer (`tokenizers.Tokenizer`): changed in place.
    """
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in TEXT_TOKENS + ADDITIONAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
        padding_side="left",
        model_max_length=MAX_LENGTH,
    )


def tiny_processor(config: Molmo2SttsConfig) -> Molmo2SttsProcessor:
    """
    Processor of the tiny model: at most 8 frames a video and at most 2 frames a second.

    Args:
        config (`Molmo2SttsConfig`): gives the size in pixels of a frame and of a patch.
    """
    return small_processor(config, tiny_tokenizer(), num_frames=8, max_fps=2)


def small_processor(
    config: Molmo2SttsConfig, tokenizer: PreTrainedTokenizerFast, num_frames: int, max_fps: float
) -> Molmo2SttsProcessor:
    """
    Processor for small frames, with a plain chat template.

    Args:
        config (`Molmo2SttsConfig`): gives the size in pixels of a frame and of a patch.
        tokenizer (`PreTrainedTokenizerFast`): see `finish_tokenizer`.
        num_frames (`int`): at most so many frames of a video.
        max_fps (`float`): at most so many frames a second.
    """
    height, width = config.vision_config.image_size
    geometry = {
        "size": {"height": height, "width": width},
        "patch_size": config.vision_config.patch_size,
        "do_convert_rgb": True,
        "do_rescale": True,
        "do_normalize": True,
    }
    sampling = {"num_frames": num_frames, "max_fps": max_fps}
    return Molmo2SttsProcessor(
        image_processor=Molmo2ImageProcessor(**geometry, max_crops=2, pooling_size=[2, 2]),
        video_processor=Molmo2SttsVideoProcessor(**geometry, pooling_size=[3, 3], **sampling),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(weight_seed: int = 0, **stts) -> Molmo2SttsForConditionalGeneration:
    """
    The tiny model in float32 and evaluation mode, with random weights that depend on the seed alone.

    Args:
        weight_seed (`int`, *optional*, defaults to 0): seed of the weights. The global random state is left as it was.
        stts: fields of `SttsConfig`, such as `prune_ratio` (fraction of a video's windows to remove).

    Raises:
        ValueError: if a field of `SttsConfig` is out of its range.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weight_seed)
        model = Molmo2SttsForConditionalGeneration(tiny_config(**stts))
    model.generation_config = GenerationConfig(
        eos_token_id=_token_id("<|im_end|>"), pad_token_id=_token_id("<|endoftext|>")
    )
    return model.eval()


__all__ = ["finish_tokenizer", "small_processor", "tiny_config", "tiny_model", "tiny_processor", "tiny_tokenizer"]
