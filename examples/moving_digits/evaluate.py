"""Counts right answers of models on the benchmark, at several prune ratios, and where they keep windows.

    python examples/moving_digits/evaluate.py RESULTS.json BENCHMARK MODEL [MODEL ...]

MODEL is RULE:SEED:FOLDER; RULE is applied to the model (see `rules.py`), RULE and SEED are written into the results.
Every question is answered greedily, by itself, from the video alone; an answer counts if every token of it is right.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmark import Video, read_benchmark
from conversations import LONG_SAMPLE, Conversation, ConversationWriter, frames_to_inputs, pad_left
from rules import RULES, apply_rule
from scenes import SETS
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.video_utils import VideoMetadata
from windows import sprite_cover

from modeling_stts import Molmo2SttsForConditionalGeneration, Molmo2SttsProcessor
from modeling_stts.modeling_molmo2_stts import Molmo2SttsVideoFeatures


RATIOS = [0.0, 0.3, 0.5, 0.7, 0.8, 0.9]
MORE_FRAMES = (2 * LONG_SAMPLE, 4 * LONG_SAMPLE)  # of long videos, to scale at test time
FRAMES_PER_BATCH = 768


class Sample(NamedTuple):
    """
    A decoded video.

    video (`Video`): file, scene and questions.
    frames (`np.ndarray`): indices of the sampled frames.
    images (`torch.Tensor` of shape `(num_frames, 3, height, width)`, uint8).
    """

    video: Video
    frames: np.ndarray
    images: torch.Tensor


class Setting(NamedTuple):
    """
    ratio (`float`): fraction of windows to remove.
    num_frames (`int`): at most so many frames are sampled of a long video.
    changes (`dict`): fields of `SttsConfig` that differ from the rule's.
    """

    ratio: float
    num_frames: int = LONG_SAMPLE
    changes: dict[str, Any] = {}


def decode(videos: list[Video], processor: Molmo2SttsProcessor, num_frames: int, workers: int) -> list[Sample]:
    """Reads the sampled frames of every file."""

    def decode_one(video: Video) -> Sample:
        def sample(metadata: VideoMetadata) -> np.ndarray:
            return processor.video_processor.sample_frames(metadata, num_frames=num_frames)

        images, metadata = processor.video_processor.fetch_videos(str(video.path), sample)
        return Sample(video, np.asarray(metadata.frames_indices), torch.from_numpy(images).permute(0, 3, 1, 2))

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(decode_one, videos))


def batches(samples: list[Sample]) -> Iterator[list[Sample]]:
    """Groups samples of one number of frames."""
    by_length: dict[int, list[Sample]] = {}
    for sample in samples:
        by_length.setdefault(len(sample.frames), []).append(sample)
    for num_frames, group in by_length.items():
        size = max(1, FRAMES_PER_BATCH // num_frames)
        yield from (group[i : i + size] for i in range(0, len(group), size))


class SharedVideos(NamedTuple):
    """
    Prompts in which all questions about a video stand behind it, none of them seeing another.

    inputs (`dict`): `input_ids`, `attention_mask`, `mm_token_type_ids` and `labels` of shape `(batch_size, length)`.
    question_idx (`torch.Tensor` of shape `(batch_size, length)`): 0 for the video, then 1, 2, ... for its questions.
    position_ids (`torch.Tensor` of shape `(batch_size, length)`): every question follows the video at once.
    """

    inputs: dict[str, torch.Tensor]
    question_idx: torch.Tensor
    position_ids: torch.Tensor


def write_prompts(samples: list[Sample], writer: ConversationWriter) -> SharedVideos:
    """Writes the prompts of a batch."""
    conversations, question_idx, position_ids = [], [], []
    for sample in samples:
        alone = [writer.write(sample.video.scene, sample.frames, [question]) for question in sample.video.questions]
        end = len(alone[0].input_ids) - alone[0].input_ids[::-1].index(writer.frame_end_id)
        parts = [alone[0].part(0, end), *(conversation.part(end, None) for conversation in alone)]
        lengths = [len(part.input_ids) for part in parts]
        conversations.append(Conversation(*(sum(tokens, []) for tokens in zip(*parts))))
        question_idx.append(torch.arange(len(parts)).repeat_interleave(torch.tensor(lengths)))
        starts = [0] + [end] * len(alone)
        position_ids.append(torch.cat([start + torch.arange(length) for start, length in zip(starts, lengths)]))
    inputs = pad_left(conversations, writer.pad_token_id, writer.image_token_ids)
    return SharedVideos(inputs, *(pad_sequence(rows, True, 0, "left") for rows in (question_idx, position_ids)))


def right_answers(model, samples: list[Sample], prompts: SharedVideos, ratio: float) -> tuple[list[list[bool]], Any]:
    """Whether each question of each video is answered rightly, and the video features."""
    device = model.device
    images = torch.stack([sample.images for sample in samples]).to(device)
    video = model.get_video_features(**frames_to_inputs(images), prune_ratio=ratio)
    inputs = {name: tensor.to(device) for name, tensor in prompts.inputs.items()}
    position_ids, question_idx = prompts.position_ids.to(device), prompts.question_idx.to(device)
    if video.num_pruned > 0:
        cut_inputs, cut = model.cut_inputs(video.keep_masks, inputs, position_ids)
        inputs |= cut_inputs
        question_idx = cut.take(question_idx, 0)
        # With compact positions a question follows the cut video.
        position_ids = cut_inputs["position_ids"]
        if position_ids is None:
            position_ids = compact_positions(question_idx, inputs["attention_mask"])
    mask = question_mask(question_idx, inputs["attention_mask"], inputs["mm_token_type_ids"])
    labels = inputs.pop("labels")
    logits = model(
        **{**inputs, "attention_mask": mask, "position_ids": position_ids},
        mm_encoder_outputs={"video": Molmo2SttsVideoFeatures(pooler_output=video.pooler_output)},
        use_cache=False,
    ).logits
    is_wrong = (logits[:, :-1].argmax(-1) != labels[:, 1:]) & (labels[:, 1:] >= 0)
    wrong = torch.zeros(len(samples), 1 + int(question_idx.max()), device=device, dtype=torch.long)
    wrong = wrong.scatter_add(1, question_idx[:, 1:], is_wrong.long()).cpu()
    rows = [[count == 0 for count in row[1 : 1 + len(s.video.questions)]] for row, s in zip(wrong.tolist(), samples)]
    return rows, video


def question_mask(question_idx: torch.Tensor, attention_mask: torch.Tensor, is_video: torch.Tensor) -> torch.Tensor:
    """
    Who sees whom: video tokens each other, everyone the video and its own question before it.

    Args:
        question_idx, attention_mask, is_video (`torch.Tensor` of shape `(batch_size, length)`).

    Returns:
        `torch.Tensor` of shape `(batch_size, 1, length, length)`, bool.
    """
    length = question_idx.shape[1]
    is_before = torch.ones(length, length, dtype=torch.bool, device=question_idx.device).tril()
    is_same = question_idx[:, :, None] == question_idx[:, None]
    sees = is_before & (is_same | (question_idx == 0)[:, None]) & attention_mask.bool()[:, None]
    sees |= is_video.bool()[:, :, None] & is_video.bool()[:, None]
    # A row of padding must see something.
    return (sees | torch.eye(length, dtype=torch.bool, device=sees.device))[:, None]


def compact_positions(question_idx: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions without gaps: the video's tokens are counted, and every question goes on behind them."""
    position = attention_mask.cumsum(-1) - 1
    end = (attention_mask * (question_idx == 0)).sum(-1, keepdim=True)
    is_same = question_idx[:, :, None] == question_idx[:, None]
    in_question = (is_same & attention_mask.bool()[:, None]).tril().sum(-1) - 1
    return torch.where(question_idx == 0, position, end + in_question).clamp(min=0)


def count_covers(samples: list[Sample], keep_masks: tuple[torch.Tensor, ...]) -> dict[str, int]:
    """
    How many windows there are and are kept after the first frame, and how many of each touch a digit, or the place
    where one was in the frame before.
    """
    counts = Counter()
    for sample, keep_mask in zip(samples, keep_masks):
        times = sample.frames / sample.video.scene.fps
        digits = sample.video.scene.digits
        touched = np.max([sprite_cover(digit, times) for digit in digits], axis=0) > 0
        touched = touched[1:] | touched[:-1]
        kept = keep_mask[1:].bool().cpu().numpy()
        counts += Counter(windows=kept.size, touched=int(touched.sum()), kept=int(kept.sum()))
        counts += Counter(kept_touched=int((kept & touched).sum()))
    return dict(counts)


@torch.no_grad()
def evaluate(model, asked: list[tuple[list[Sample], SharedVideos]], ratio: float) -> dict[str, Any]:
    """
    Answers all questions about samples of one set.

    Args:
        model: in evaluation mode.
        asked (`list[tuple[list[Sample], SharedVideos]]`): batches of samples, and their prompts.
        ratio (`float`): fraction of windows to remove.

    Returns:
        `dict`: `questions` (`dict` from kind to right answers, their number and what chance would give) and `windows`.
    """
    questions: dict[str, list[float]] = {}
    windows = Counter()
    for batch, prompts in asked:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            rows, video = right_answers(model, batch, prompts, ratio)
        windows += Counter(count_covers(batch, video.keep_masks))
        for sample, row in zip(batch, rows):
            for question, is_right in zip(sample.video.questions, row):
                counts = questions.setdefault(question.kind, [0, 0, 0.0])
                counts[:] = counts[0] + is_right, counts[1] + 1, counts[2] + 1 / question.num_choices
    return {"questions": questions, "windows": dict(windows)}


def settings_of(rule: str, name: str) -> list[Setting]:
    """What a rule's model is tried at on a set."""
    if rule == "unpruned":
        return [Setting(0.0, num_frames) for num_frames in (LONG_SAMPLE, *(MORE_FRAMES if name == "long" else ()))]
    settings = [Setting(ratio) for ratio in RATIOS]
    if name == "long":
        settings += [Setting(1 - LONG_SAMPLE / num_frames, num_frames) for num_frames in MORE_FRAMES]
    if rule == "stts" and name == "long":
        # More frames than in training also stand farther apart than there.
        settings += [
            setting._replace(changes={"position_ids": "compact"}) for setting in settings[-len(MORE_FRAMES) :]
        ]
    elif rule == "stts":
        settings += [Setting(ratio, changes={"refill": True}) for ratio in (0.5, 0.8)]
    return settings


def evaluate_model(
    name: str, model, writer: ConversationWriter, samples: dict[tuple[str, int], list[Sample]]
) -> Iterator[dict[str, Any]]:
    """
    Tries one model at all settings of its rule.

    Args:
        name (`str`): the rule.
        model: in evaluation mode; the rule is applied to it.
        writer (`ConversationWriter`): writes the prompts.
        samples (`dict`): the decoded videos of a set, at a number of frames.
    """
    apply_rule(model, name)
    asked = {
        key: [(batch, write_prompts(batch, writer)) for batch in batches(of_set)] for key, of_set in samples.items()
    }
    for set_name in SETS:
        for setting in settings_of(name, set_name):
            before = {field: getattr(model.config.stts_config, field) for field in setting.changes}
            for field, value in setting.changes.items():
                setattr(model.config.stts_config, field, value)
            counts = evaluate(model, asked[set_name, setting.num_frames], setting.ratio)
            for field, value in before.items():
                setattr(model.config.stts_config, field, value)
            yield {"set": set_name, **setting._asdict(), **counts}


def parse_model(entry: str) -> tuple[str, int, str]:
    """
    Takes RULE:SEED:FOLDER apart.

    Raises:
        ValueError: if it has another form, the rule is not known, the seed is no number or the folder does not exist.
    """
    rule, _, rest = entry.partition(":")
    seed, _, folder = rest.partition(":")
    if rule not in RULES:
        raise ValueError(f"RULE of {entry!r} must be one of: {', '.join(RULES)}.")
    if not seed.isdecimal():
        raise ValueError(f"SEED of {entry!r} must be a whole number; a model is RULE:SEED:FOLDER.")
    if not Path(folder).is_dir() or not folder:
        raise ValueError(f"FOLDER of {entry!r} is not a folder.")
    return rule, int(seed), folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file to write")
    parser.add_argument("benchmark", type=Path, help="folder that benchmark.py made")
    parser.add_argument("models", nargs="+", metavar="RULE:SEED:FOLDER")
    parser.add_argument("--workers", type=int, default=4, help="threads that decode")
    args = parser.parse_args()
    try:
        models = [parse_model(entry) for entry in args.models]
        videos = read_benchmark(args.benchmark)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    device, samples, rows = "cuda" if torch.cuda.is_available() else "cpu", {}, []
    for rule, seed, folder in tqdm(models, disable=not sys.stderr.isatty()):
        processor = Molmo2SttsProcessor.from_pretrained(folder)
        model = Molmo2SttsForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        for name in SETS:
            for num_frames in {setting.num_frames for setting in settings_of(rule, name)}:
                if (name, num_frames) not in samples:
                    chosen = [video for video in videos if video.scene.name == name]
                    samples[name, num_frames] = decode(chosen, processor, num_frames, args.workers)
        torch.manual_seed(seed)  # of the windows that the random rule keeps
        results = evaluate_model(rule, model, ConversationWriter(processor), samples)
        rows += [{"rule": rule, "seed": seed, **row} for row in results]
        unfinished = args.results.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(rows))
        unfinished.replace(args.results)


if __name__ == "__main__":
    main()
