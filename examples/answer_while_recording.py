"""Answers a question about the last minutes of a video, again and again, while its file is still being written.

    ffmpeg -i rtsp://camera -c copy -f mpegts recording.ts &       # or .mkv; MP4 must be fragmented
    python examples/answer_while_recording.py recording.ts --model org/name --question "What happens?"

The video is encoded once, in chunks of seconds. Every chunk keeps the same number of tokens, whatever its frames are,
and chunks before the last minutes are forgotten, so that neither memory nor the time of an answer grows.
"""

import argparse
import sys
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from growing_video import TimedFrame, in_chunks, read_frames
from transformers import AutoModelForImageTextToText, AutoProcessor


class EncodedChunk(NamedTuple):
    """
    times (`list[float]`): of its frames, in seconds after the first one of the video.
    features (`ModelOutput`): what the model's `get_next_video_features` returned.
    """

    times: list[float]
    features: Any

    @property
    def num_tokens(self) -> int:
        return len(self.features.pooler_output[0])


class LastMinutes:
    """
    What is kept of the end of a video.

    Args:
        model, processor: as they are loaded from a hub folder.
        tokens_per_chunk (`int`): tokens that are kept of a chunk. The first frame of the video is kept whole.
        window (`float`): seconds after which a chunk is forgotten.

    Raises:
        ValueError: if no token is to be kept.
    """

    def __init__(self, model: Any, processor: Any, tokens_per_chunk: int, window: float):
        if tokens_per_chunk < 1:
            raise ValueError(f"a chunk must keep at least 1 token, got {tokens_per_chunk}.")
        self.model, self.processor = model, processor
        self.tokens_per_chunk, self.window = tokens_per_chunk, window
        self.chunks: deque[EncodedChunk] = deque()
        self.grid: list[int] = []

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @torch.no_grad()
    def add(self, frames: list[TimedFrame]) -> None:
        """Encodes the frames that follow those before, and forgets chunks that are too old."""
        images = np.stack([frame.image for frame in frames])
        video = self.processor.video_processor(images, do_sample_frames=False, return_tensors="pt")
        video = video.to(self.model.device, self.model.dtype)
        self.grid = video["video_grids"][0, 1:].tolist()
        features = self.model.get_next_video_features(
            video["pixel_values_videos"],
            video["video_token_pooling"],
            video["video_grids"],
            prune_ratio=self._prune_ratio(len(video["video_token_pooling"])),
            previous=self.chunks[-1].features if self.chunks else None,
        )
        self.chunks.append(EncodedChunk([frame.seconds for frame in frames], features))
        while self.chunks[0].times[-1] < frames[-1].seconds - self.window:
            self.chunks.popleft()

    def _prune_ratio(self, num_windows: int) -> float:
        # Half a token more, because the number of tokens to remove is truncated.
        return max(0.0, (num_windows - self.tokens_per_chunk + 0.5) / num_windows)

    def prompt(self, question: str) -> dict[str, torch.Tensor]:
        """The prompt of a question, as it is for a video that is complete: with all tokens of the last minutes."""
        times = [time for chunk in self.chunks for time in chunk.times]
        content = [{"type": "video"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        video = self.processor.get_video_string(torch.tensor([len(times), *self.grid]), times)
        return self.processor(text=text.replace(self.processor.video_token, video), return_tensors="pt")

    def answer(self, question: str, **generation: Any) -> str:
        """
        Answers a question about the last minutes.

        Args:
            question (`str`).
            generation: settings of the model's `generate`.
        """
        inputs = self.prompt(question).to(self.model.device)
        features = [chunk.features for chunk in self.chunks]
        output = self.model.generate(**inputs, video_features=features, **generation)
        return self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", help="a file that grows; it need not exist yet")
    parser.add_argument("--model", required=True, help="a hub folder or repository")
    parser.add_argument("--question", default="What happened in the last minutes?")
    parser.add_argument("--every", type=float, default=10, help="seconds of video between two answers")
    parser.add_argument("--window", type=float, default=120, help="seconds of video that an answer is about")
    parser.add_argument("--fps", type=float, default=2, help="frames a second that are looked at")
    parser.add_argument("--chunk-seconds", type=float, default=4, help="seconds of video that are encoded at once")
    parser.add_argument("--tokens-per-chunk", type=int, default=128, help="video tokens that are kept of them")
    parser.add_argument("--patience", type=float, default=10, help="seconds without a new byte that end the recording")
    args = parser.parse_args()
    try:
        run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, device_map="auto")
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    minutes, next_answer, end = LastMinutes(model, processor, args.tokens_per_chunk, args.window), args.every, 0.0
    for chunk in in_chunks(read_frames(args.recording, args.fps, args.patience), args.chunk_seconds):
        minutes.add(chunk)
        end = chunk[-1].seconds
        if end >= next_answer:
            next_answer = end + args.every
            print_answer(minutes, end, args.question)
    print_answer(minutes, end, args.question)


def print_answer(minutes: LastMinutes, seconds: float, question: str) -> None:
    answer = minutes.answer(question, max_new_tokens=32, do_sample=False)
    print(f"{seconds:8.1f} s  {minutes.num_tokens:5} video tokens  {answer!r}", flush=True)


if __name__ == "__main__":
    main()
