"""Paints which windows of a video's frames a model keeps: dropped ones are dimmed.

python examples/show_kept.py clip.mp4 kept.png --model org/name
python examples/show_kept.py clip.mp4 kept.png --model org/name --prune-ratio 0.8 --num-frames 12 --columns 6
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


BRIGHTNESS = 0.25  # of a dropped window
GAP = 4  # pixels between frames


def dim_dropped(frames: torch.Tensor, keep_mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Darkens what a model does not keep.

    Args:
        frames (`torch.Tensor` of shape `(num_frames, 3, height, width)`, uint8).
        keep_mask (`torch.Tensor` of shape `(num_frames, num_windows)`): 1 = kept.
        grid (`tuple[int, int]`): rows and columns of windows of a frame.

    Returns:
        `torch.Tensor` of the frames' shape, uint8.
    """
    brightness = BRIGHTNESS + (1 - BRIGHTNESS) * keep_mask.float().view(-1, 1, *grid)
    brightness = torch.nn.functional.interpolate(brightness, size=frames.shape[2:], mode="nearest")
    return (frames * brightness).round().byte()


def contact_sheet(frames: torch.Tensor, columns: int) -> Image.Image:
    """
    Puts frames beside and below each other, on white.

    Args:
        frames (`torch.Tensor` of shape `(num_frames, 3, height, width)`, uint8).
        columns (`int`): frames in a row.
    """
    num_frames, _, height, width = frames.shape
    columns = min(columns, num_frames)
    rows = -(-num_frames // columns)
    size = (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    for i, frame in enumerate(frames):
        place = (i % columns * (width + GAP), i // columns * (height + GAP))
        sheet.paste(Image.fromarray(frame.permute(1, 2, 0).numpy()), place)
    return sheet


@torch.no_grad()
def show_kept(args: argparse.Namespace) -> str:
    """Writes the picture; returns a line about it."""
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, device_map="auto")
    video_processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True).video_processor
    sample = functools.partial(video_processor.sample_frames, num_frames=args.num_frames)
    frames, _ = video_processor.fetch_videos(args.video, sample)
    inputs = video_processor(frames, do_sample_frames=False, return_tensors="pt")
    video = model.get_video_features(**inputs.to(model.device), prune_ratio=args.prune_ratio)
    keep_mask = video.keep_masks[0].cpu()
    grid = tuple(inputs["video_grids"][0, 1:].tolist())
    dimmed = dim_dropped(torch.from_numpy(frames).permute(0, 3, 1, 2), keep_mask, grid)
    contact_sheet(dimmed, args.columns).save(args.out)
    return f"{args.out}: {int(keep_mask.sum())} of {keep_mask.numel()} windows kept in {len(keep_mask)} frames"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", help="a video file")
    parser.add_argument("out", type=Path, help="the picture to write, such as kept.png")
    parser.add_argument("--model", required=True, help="a hub folder or repository")
    parser.add_argument("--prune-ratio", type=float, help="fraction of windows to remove; the model's own by default")
    parser.add_argument("--num-frames", type=int, default=16, help="frames to sample (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=8, help="frames in a row (default: %(default)s)")
    args = parser.parse_args()
    if args.columns < 1:
        parser.error(f"--columns must be at least 1, got {args.columns}")
    try:
        print(show_kept(args))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
