"""Batches of training conversations: scenes, and questions with their answers as token ids. Drawn from seeds."""

from typing import Any, NamedTuple

import numpy as np
import torch
from model import PATCH_SIZE
from render import Layout, Renderer, compress, lay_out
from scenes import GRID, MAX_DIGITS, MAX_SEED, Question, Scene, describe, draw_questions, draw_scene
from torch.utils.data import Dataset
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD


SHARES = {"short": 0.6, "long": 0.25, "detail": 0.15}  # of the batches
QUESTIONED = 0.8  # share of videos with questions; the others are only described
LONG_SAMPLE = 64  # frames
GAPPED = 0.5  # share of the batches with gaps in positions, where there are any
MAX_GAP = 256  # positions; with it 64 frames reach as far as 256 frames do without gaps


class Conversation(NamedTuple):
    """
    input_ids, labels (`list[int]`): of one length; labels are -100 but for the answers and the token that ends each.
    """

    input_ids: list[int]
    labels: list[int]

    def part(self, start: int, end: int | None) -> "Conversation":
        """The tokens from `start` to just before `end`, or to the last if it is `None`."""
        return Conversation(self.input_ids[start:end], self.labels[start:end])


class Conversations(Dataset):
    """
    One item is one batch: videos of one length, each with all its questions as turns of one conversation.

    Args:
        processor (`Molmo2SttsProcessor`): gives the tokens.
        num_batches (`int`): length of the training.
        seed (`int`): what all batches are drawn from; item `i` depends on the seed and `i` alone.
        frames_per_batch (`int`): a batch holds as many videos as have so many frames together.
        prune_ratios (`list[float]`): each batch is pruned by one of them.
        num_easy (`int`, *optional*, defaults to 0): so many batches at first have videos of two digits at most, then
            three.
        has_gaps (`bool`, *optional*, defaults to `False`): whether half of the batches have `position_ids` with gaps.
    """

    def __init__(
        self,
        processor,
        num_batches: int,
        seed: int,
        *,
        frames_per_batch: int,
        prune_ratios: list[float],
        num_easy: int = 0,
        has_gaps: bool = False,
    ):
        self.writer = ConversationWriter(processor)
        self.num_batches, self.seed, self.num_easy, self.has_gaps = num_batches, seed, num_easy, has_gaps
        self.frames_per_batch, self.prune_ratios = frames_per_batch, prune_ratios

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, i: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, i])
        name = rng.choice(list(SHARES), p=list(SHARES.values()))
        max_digits = 2 + 2 * i // self.num_easy if i < self.num_easy else MAX_DIGITS
        scenes = self._draw_scenes(str(name), max_digits, rng)
        frames = sampled_frames(scenes[0])
        conversations = [self.writer.write(scene, frames, draw_turns(scene, rng)) for scene in scenes]
        batch = {
            "name": str(name),
            "layout": lay_out(scenes, [frames] * len(scenes), "train"),
            "seed": i,
            "prune_ratio": float(rng.choice(self.prune_ratios)),
            **pad_left(conversations, self.writer.pad_token_id, self.writer.image_token_ids),
        }
        if self.has_gaps and rng.random() < GAPPED:
            batch["position_ids"] = positions_with_gaps(batch["input_ids"] == self.writer.frame_end_id, rng)
        return batch

    def _draw_scenes(self, name: str, max_digits: int, rng: np.random.Generator) -> list[Scene]:
        """As many as a batch holds of the first one's length."""
        scenes: list[Scene] = []
        while not scenes or len(scenes) < self.frames_per_batch // len(sampled_frames(scenes[0])):
            scene = draw_scene(name, "train", int(rng.integers(MAX_SEED)))
            has_length = not scenes or scene.num_frames == scenes[0].num_frames
            if has_length and len(scene.digits) <= max_digits:
                scenes.append(scene)
        return scenes


def draw_turns(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """All questions and the description last, where it cannot give answers away; or the description alone."""
    questions = draw_questions(scene, rng) if rng.random() < QUESTIONED else []
    return [*questions, describe(scene)]


class ConversationWriter:
    """Writes conversations as the processor does, without decoding a video first. Every text is tokenized once."""

    def __init__(self, processor):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.pad_token_id = self.tokenizer.pad_token_id
        self.image_token_ids = processor.image_token_ids
        self.frame_end_id = self.tokenizer.convert_tokens_to_ids("<frame_end>")
        self.prompts = {}
        self.ids = {}

    def write(self, scene: Scene, frames: np.ndarray, questions: list[Question]) -> Conversation:
        """
        Args:
            scene (`Scene`): the video.
            frames (`np.ndarray`): indices of the sampled frames.
            questions (`list[Question]`): turns of the conversation.
        """
        input_ids, labels = [], []
        for turn, question in enumerate(questions):
            before, after = self._prompt(question.text, is_first=turn == 0)
            prompt = before + (self._video_ids(scene, frames) if turn == 0 else []) + after
            answer = self._ids(question.answer + self.tokenizer.eos_token)
            input_ids += prompt + answer
            labels += [-100] * len(prompt) + answer
        return Conversation(input_ids, labels)

    def _prompt(self, text: str, is_first: bool) -> tuple[list[int], list[int]]:
        """What stands before and after the video where a question is asked."""
        if (text, is_first) not in self.prompts:
            content = [{"type": "video"}] * is_first + [{"type": "text", "text": text}]
            asked = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            before, _, after = asked.rpartition(self.processor.video_token)
            start = self.tokenizer.eos_token if is_first else "\n"
            self.prompts[text, is_first] = self._ids(start + before), self._ids(after)
        return self.prompts[text, is_first]

    def _ids(self, text: str) -> list[int]:
        if text not in self.ids:
            self.ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.ids[text]

    def _video_ids(self, scene: Scene, frames: np.ndarray) -> list[int]:
        grid = torch.tensor([1, GRID, GRID])
        texts = [self.processor.get_video_string(grid, [frame / scene.fps]) for frame in frames]
        return sum((self._ids(" " * (position > 0) + text) for position, text in enumerate(texts)), [])


def sampled_frames(scene: Scene, num_frames: int | None = None) -> np.ndarray:
    """
    The frames that the processor would sample.

    Args:
        scene (`Scene`): the video.
        num_frames (`int`, *optional*): how many; all of a short video and 64 of a long one if not given.
    """
    num_frames = min(scene.num_frames, num_frames or LONG_SAMPLE)
    return np.arange(0, scene.num_frames, scene.num_frames / num_frames).astype(int)


def pad_left(
    conversations: list[Conversation], pad_token_id: int, image_token_ids: list[int]
) -> dict[str, torch.Tensor]:
    """
    `input_ids`, `attention_mask`, `mm_token_type_ids` and `labels` of shape `(num_conversations, longest)`.

    Args:
        conversations (`list[Conversation]`).
        pad_token_id (`int`): what stands before the shorter ones.
        image_token_ids (`list[int]`): tokens of type 1, which see each other both ways: those of windows, and those
            around a frame.
    """
    longest = max(len(conversation.input_ids) for conversation in conversations)
    input_ids, labels = (
        torch.tensor([[padding] * (longest - len(ids)) + ids for ids in rows])
        for padding, rows in zip((pad_token_id, -100), zip(*conversations))
    )
    lengths = torch.tensor([len(conversation.input_ids) for conversation in conversations])
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(longest) >= longest - lengths[:, None]).long(),
        "mm_token_type_ids": torch.isin(input_ids, torch.tensor(image_token_ids)).long(),
        "labels": labels,
    }


def positions_with_gaps(is_frame_end: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """
    Positions that reach as far as those of a longer video: behind every frame some are left out, how many is drawn, up
    to a number that is drawn for each video.

    Args:
        is_frame_end (`torch.Tensor` of shape `(batch_size, length)`, bool): the last token of each frame.
        rng (`np.random.Generator`): draws the gaps, from 0 to `MAX_GAP`.

    Returns:
        `torch.Tensor` of shape `(batch_size, length)`, int64.
    """
    widest = rng.integers(MAX_GAP + 1, size=(len(is_frame_end), 1))
    gaps = is_frame_end * torch.from_numpy(rng.integers(widest + 1, size=is_frame_end.shape))
    return torch.arange(is_frame_end.shape[1]) + gaps.cumsum(-1) - gaps


def render_inputs(layout: Layout, renderer: Renderer, seed: int) -> dict[str, torch.Tensor]:
    """
    Renders scenes as the video processor would hand them over after a trip through a codec.

    Args:
        layout (`Layout`): the scenes.
        renderer (`Renderer`): of their split.
        seed (`int`): seed of the noise.

    Returns:
        `dict`: `pixel_values_videos`, `video_token_pooling` and `video_grids`, as in `Molmo2SttsVideoProcessor`.
    """
    images = renderer.render(layout, seed)
    quality = torch.from_numpy(layout.quality).to(images.device, torch.float32)
    return frames_to_inputs(compress(images, quality))


def frames_to_inputs(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    What the video processor makes of frames of the model's own size.

    Args:
        images (`torch.Tensor` of shape `(num_videos, num_frames, 3, FRAME_SIZE, FRAME_SIZE)`, uint8).
    """
    num_videos, num_frames = images.shape[:2]
    mean, std = (255 * images.new_tensor(values, dtype=torch.float32) for values in _NORMALIZATION)
    pixels = (images.flatten(0, 1).float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    patches = pixels.unflatten(3, (-1, PATCH_SIZE)).unflatten(2, (-1, PATCH_SIZE))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    side = 3 * GRID
    windows = torch.arange(side**2, device=images.device).view(GRID, 3, GRID, 3).transpose(1, 2).reshape(-1, 9)
    first = torch.arange(num_videos * num_frames, device=images.device) * side**2
    return {
        "pixel_values_videos": patches,
        "video_token_pooling": (first.view(-1, 1, 1) + windows).flatten(0, 1),
        "video_grids": torch.tensor([[num_frames, GRID, GRID]] * num_videos),
    }


_NORMALIZATION = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
