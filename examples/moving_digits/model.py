"""The small Molmo2 with STTS that learns to answer questions about moving digits: shapes, tokenizer, processor."""

import numpy as np
import torch
from scenes import FPS, FRAME_SIZE, SETS, describe, draw_questions, draw_scene
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hub_upload.tiny import (
    ADDITIONAL_TOKENS,
    MAX_LENGTH,
    TEXT_TOKENS,
    TOKEN_FIELDS,
    finish_tokenizer,
    small_processor,
)
from modeling_stts import Molmo2SttsConfig, Molmo2SttsForConditionalGeneration, Molmo2SttsProcessor


PATCH_SIZE = 6
BASE_VOCAB_SIZE = 512
NUM_FRAMES = 64
CORPUS_SCENES = 300  # of each set
INITIALIZER_RANGE = 0.04


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose merges come from this benchmark's questions, with Molmo2's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCAB_SIZE - len(TEXT_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    # Unused places keep the special tokens at fixed ids, whatever the number of merges.
    unused = [f"<unused{i}>" for i in range(BASE_VOCAB_SIZE - len(TEXT_TOKENS) - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in unused])
    return finish_tokenizer(tokenizer)


def _corpus() -> list[str]:
    """Questions and answers as they stand in a chat, and the times that stand before frames."""
    texts = [f" {second}.{tenth} " for second in range(64) for tenth in (0, 5)]
    for name in SETS:
        for seed in range(CORPUS_SCENES):
            scene = draw_scene(name, "train", seed)
            for question in [*draw_questions(scene, np.random.default_rng(seed)), describe(scene)]:
                texts += ["user\n", question.text, "\n", "assistant\n", question.answer]
    return texts


def make_config(tokenizer: PreTrainedTokenizerFast) -> Molmo2SttsConfig:
    """Nine million parameters; frames of 18 x 18 patches, pooled 3 x 3 to 36 windows."""
    vit_shape = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64}
    return Molmo2SttsConfig(
        vision_config={
            **vit_shape,
            "intermediate_size": 512,
            "initializer_range": INITIALIZER_RANGE,
            "num_hidden_layers": 8,
            "image_size": [FRAME_SIZE, FRAME_SIZE],
            "patch_size": PATCH_SIZE,
        },
        adapter_config={
            **vit_shape,
            "intermediate_size": 512,
            "initializer_range": INITIALIZER_RANGE,
            "vision_feature_layer": [7, 5],
            "text_hidden_size": 256,
        },
        text_config={
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 768,
            "initializer_range": INITIALIZER_RANGE,
            "num_hidden_layers": 6,
            "vocab_size": BASE_VOCAB_SIZE,
            "additional_vocab_size": len(ADDITIONAL_TOKENS),
            "max_position_embeddings": MAX_LENGTH,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        **{field: tokenizer.convert_tokens_to_ids(token) for field, token in TOKEN_FIELDS.items()},
        initializer_range=INITIALIZER_RANGE,
        stts_config={"score_after_layer": 2},
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Molmo2SttsProcessor:
    """At most 64 frames of a video, at most 4 a second."""
    return small_processor(make_config(tokenizer), tokenizer, NUM_FRAMES, max(FPS.values()))


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Molmo2SttsForConditionalGeneration:
    """
    The untrained model, in float32.

    Args:
        tokenizer: gives the ids of the special tokens.
        seed (`int`): seed of the weights.
    """
    torch.manual_seed(seed)
    model = Molmo2SttsForConditionalGeneration(make_config(tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model
