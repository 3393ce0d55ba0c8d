"""Asks a question about a video file, unpruned and pruned, and prints tokens, times and answers.

    python examples/ask_a_video.py                    # makes a video with moving digits and asks about one of them
    python examples/ask_a_video.py --seed 7           # another video, another digit
    python examples/ask_a_video.py clip.mp4 --model org/name --question "What happens?"

The default model stands in this repository. It knows videos of moving digits, and nothing else.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor


HERE = Path(__file__).parent
MODEL = HERE / "moving_digits" / "model"
QUESTION = "What happens in this video?"
SEED = 3


class MadeVideo(NamedTuple):
    """
    path (`Path`): the MP4 file.
    question (`str`), answer (`str`): what may be asked about it, and what is right.
    """

    path: Path
    question: str
    answer: str


def make_video(folder: Path, seed: int) -> MadeVideo:
    """
    Makes a video of handwritten digits that move over a photograph; neither was seen in training.

    Args:
        folder (`Path`): does not exist.
        seed (`int`): what the video is drawn from.

    Raises:
        ValueError: if the seed is out of its range.
    """
    # In another process, so that this one knows the model's code from the hub folder alone.
    command = [sys.executable, HERE / "moving_digits" / "benchmark.py", folder, "--num-videos", "1", "0", "0"]
    made = subprocess.run([*command, "--seed", str(seed), "--workers", "1"], capture_output=True, text=True)
    if made.returncode != 0:
        raise ValueError(made.stderr.strip().removeprefix("error: "))
    video = json.loads((folder / "questions.jsonl").read_text())
    question = next(question for question in video["questions"] if question["kind"] == "digit")
    return MadeVideo(folder / video["video"], question["text"], question["answer"])


def milliseconds(function, *args, **kwargs):
    """The function's result and how long it took."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, 1000 * (time.perf_counter() - start)


def ask(model, processor, video: str, question: str, num_frames: int | None, prune_ratios: list[float]) -> None:
    content = [{"type": "video", "path": video}, {"type": "text", "text": question}]
    inputs, decode_ms = milliseconds(
        processor.apply_chat_template,
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={} if num_frames is None else {"num_frames": num_frames},
    )
    inputs = inputs.to(model.device)
    videos = {name: inputs[name] for name in ("pixel_values_videos", "video_token_pooling", "video_grids")}
    num_tokens = inputs["input_ids"].shape[1]
    print(f"{video}: {videos['video_grids'][0, 0]} frames, decoded and prepared in {decode_ms:.0f} ms")
    print(f"{'pruned':>6} {'video tokens':>12} {'prompt tokens':>13} {'vision ms':>9} {'all ms':>7}  {question}")
    generation = {"max_new_tokens": 32, "do_sample": False}
    with torch.no_grad():
        for ratio in prune_ratios:
            model.generate(**inputs, prune_ratio=ratio, **generation)  # the first run of everything is slower
            features, vision_ms = milliseconds(model.get_video_features, **videos, prune_ratio=ratio)
            output, all_ms = milliseconds(model.generate, **inputs, prune_ratio=ratio, **generation)
            kept, dropped = sum(map(len, features.pooler_output)), features.num_pruned
            answer = processor.decode(output[0, num_tokens:], skip_special_tokens=True)
            columns = f"{ratio:6.0%} {kept:12} {num_tokens - dropped:13} {vision_ms:9.0f} {all_ms:7.0f}"
            print(f"{columns}  {answer}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", nargs="?", help="a video file; by default one with moving digits is made")
    parser.add_argument(
        "--model", default=MODEL, help="a hub folder or repository (default: a small one of this package)"
    )
    parser.add_argument(
        "--question", help=f'by default which digit has a colour, or "{QUESTION}" about a file of yours'
    )
    parser.add_argument("--seed", type=int, default=SEED, help="of the video that is made (default: %(default)s)")
    parser.add_argument("--num-frames", type=int, help="frames to sample; by default what the model's processor says")
    parser.add_argument("--prune-ratios", type=float, nargs="+", default=[0.0, 0.5, 0.8])
    parser.add_argument("--save", type=Path, help="where to keep the video that is made")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            run(args, Path(folder, "videos"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace, folder: Path) -> None:
    for ratio in args.prune_ratios:
        if not 0 <= ratio < 1:
            raise ValueError(f"A prune ratio must be at least 0 and less than 1, got {ratio}.")
    if args.video is None:
        video, question, answer = make_video(folder, args.seed)
        if args.save is not None:
            video = shutil.copy(video, args.save)
    else:
        video, question, answer = args.video, QUESTION, None
        if "://" not in video and not Path(video).is_file():
            raise ValueError(f"{video} is not a file.")
        if args.model == MODEL:
            print("This model knows videos of moving digits alone; for others pass --model.")
    try:
        model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, device_map="auto")
    except SafetensorError as error:
        raise ValueError(f"The weights of {args.model} cannot be read; are they there as a whole? {error}") from error
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    ask(model, processor, str(video), args.question or question, args.num_frames, args.prune_ratios)
    if answer is not None and args.question is None:
        print(f"The right answer is {answer}.")


if __name__ == "__main__":
    main()
