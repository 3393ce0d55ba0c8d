"""The first lesson: pictures crowded with digits, questions about them, and what every single window shows.

A language model that looks for one digit among thousands of windows whose features mean nothing yet learns to look
away instead. In a picture there are 36 windows, and a linear layer on the ViT's features keeps them telling.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from conversations import ConversationWriter, pad_left
from render import lay_out
from scenes import COLOURS, MAX_SEED, draw_picture, draw_questions
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers.utils import ModelOutput
from windows import window_labels

from modeling_stts import Molmo2SttsForConditionalGeneration


NUM_DIGITS, NUM_COLOURS = 1 + 10, 1 + len(COLOURS)  # with none


class Pictures(Dataset):
    """
    One item is one batch of videos of one frame, with conversations and the digit and colour of every window. Pictures
    have at most two digits at first and six in the end: to tell two apart is learned soon, to tell six apart from the
    start is not.

    Args:
        processor (`Molmo2SttsProcessor`): gives the tokens.
        num_batches (`int`): length of the training.
        seed (`int`): what all batches are drawn from; item `i` depends on the seed and `i` alone.
        frames_per_batch (`int`): pictures of a batch.
    """

    def __init__(self, processor, num_batches: int, seed: int, frames_per_batch: int):
        self.writer = ConversationWriter(processor)
        self.num_batches, self.seed, self.frames_per_batch = num_batches, seed, frames_per_batch

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, i: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, i])
        max_digits = 2 + i * (len(COLOURS) - 1) // self.num_batches
        seeds = rng.integers(MAX_SEED, size=self.frames_per_batch)
        scenes = [draw_picture("train", int(seed), max_digits) for seed in seeds]
        frame = np.zeros(1, dtype=int)
        conversations = [self.writer.write(scene, frame, draw_questions(scene, rng)) for scene in scenes]
        labels = np.concatenate([window_labels(scene, np.zeros(1)) for scene in scenes])
        return {
            "name": "picture",
            "layout": lay_out(scenes, [frame] * len(scenes), "train"),
            "seed": i,
            "window_labels": torch.from_numpy(labels),
            **pad_left(conversations, self.writer.pad_token_id, self.writer.image_token_ids),
        }


@dataclass
class PictureOutput(ModelOutput):
    """
    loss (`torch.Tensor`): scalar.
    logits (`torch.Tensor` of shape `(batch_size, length, vocab_size)`), labels (`(batch_size, length)`): of the text.
    window_logits (`torch.Tensor` of shape `(num_frames * num_windows, NUM_DIGITS)`): which digit a window shows.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    window_logits: torch.Tensor | None = None


class PictureLearner(nn.Module):
    """
    A model, with a linear layer that names the digit and the colour of every window from the ViT's features.

    Args:
        model: trained in place.
    """

    def __init__(self, model: Molmo2SttsForConditionalGeneration):
        super().__init__()
        self.model = model
        self.feature_layers = model.config.adapter_config.vision_feature_layer
        num_features = len(self.feature_layers) * model.config.vision_config.hidden_size
        self.head = nn.Linear(num_features, NUM_DIGITS + NUM_COLOURS)

    def forward(
        self, pixel_values_videos, video_token_pooling, video_grids, window_labels, labels, **text
    ) -> PictureOutput:
        """
        Args:
            pixel_values_videos, video_token_pooling, video_grids, labels, text: as for the model.
            window_labels (`torch.Tensor` of shape `(num_frames, num_windows, 2)`, int64): see `window_labels`.
        """
        video = self.model.get_video_features(
            pixel_values_videos, video_token_pooling, video_grids, prune_ratio=0.0, output_hidden_states=True
        )
        # The first of the hidden states is the embedding.
        patches = torch.cat([video.hidden_states[layer + 1] for layer in self.feature_layers], dim=-1).flatten(0, 1)
        logits = self.head(patches[video_token_pooling].mean(1)).float()
        digits, colours = logits.split([NUM_DIGITS, NUM_COLOURS], dim=-1)
        digit_labels, colour_labels = window_labels.flatten(0, 1).unbind(-1)
        loss = F.cross_entropy(digits, digit_labels) + F.cross_entropy(colours, colour_labels)
        answers = self.model(**text, labels=labels, mm_encoder_outputs={"video": video})
        return PictureOutput(loss + answers.loss, answers.logits, answers.labels, digits)
