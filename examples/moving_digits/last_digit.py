"""Makes data to fine-tune on: a question that no model here was trained for, about new videos of the benchmark's kind.

    python examples/moving_digits/last_digit.py OUT --num-videos 400 100    # to train and to test

OUT/train.jsonl and OUT/test.jsonl ask which digit appears last. As everywhere here, training and test videos share
neither digit images nor photographs.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmark import Video, build_benchmark, read_benchmark
from scenes import SPLITS

from hub_upload.new_folder import new_folder


QUESTION = "Which digit appears last?"


def build_data(out: str | os.PathLike, num_videos: dict[str, int], first_seed: int = 0, workers: int = 1) -> Path:
    """
    Writes the videos of both splits, and their conversations.

    Args:
        out (`str` or `os.PathLike`): the folder to make. It must not exist, but its parent must.
        num_videos (`dict[str, int]`): how many of each split.
        first_seed (`int`, *optional*, defaults to 0): seed of the first scene of each split; the others follow.
        workers (`int`, *optional*, defaults to 1): processes that render and encode.

    Returns:
        `Path`: the folder.

    Raises:
        FileExistsError: if `out` exists.
        ValueError: if a number or a seed is out of its range.
    """
    with new_folder(out) as folder:
        for split, count in num_videos.items():
            videos = read_benchmark(build_benchmark(folder / split, {"short": count}, split, first_seed, workers))
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(_ask(video)) + "\n" for video in videos))
    return Path(out)


def _ask(video: Video) -> dict[str, Any]:
    """A line of the JSONL file."""
    path = f"{video.path.parent.name}/{video.path.name}"
    asked = [{"type": "video", "path": path}, {"type": "text", "text": QUESTION}]
    answer = str(video.scene.digits[-1].label)
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to make; it must not exist")
    parser.add_argument("--num-videos", type=int, nargs=len(SPLITS), default=[400, 100], metavar="N")
    parser.add_argument("--seed", type=int, default=10**6, help="seed of the first scene, away from the benchmark's")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    try:
        out = build_data(args.out, dict(zip(SPLITS, args.num_videos)), args.seed, args.workers)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{out}: {sum(args.num_videos)} videos")


if __name__ == "__main__":
    main()
