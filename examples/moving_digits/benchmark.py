"""Makes the benchmark: MP4 files, and questions with one-word answers. The same arguments give the same bytes.

    python examples/moving_digits/benchmark.py OUT --num-videos 250 150 250    # of the sets short, long and detail

OUT/questions.jsonl has one line for each video: its file, its set, the seed of its scene, and its questions.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from render import Renderer, lay_out
from scenes import MAX_SEED, SETS, SPLITS, Question, Scene, draw_questions, draw_scene
from tqdm import tqdm

from hub_upload.new_folder import new_folder


FIRST_CRF, LAST_CRF = 30, 16  # H.264's constant rate factor at the lowest and the highest quality of a scene
QUESTIONS_FILE = "questions.jsonl"


class Video(NamedTuple):
    """
    path (`Path`): the MP4 file.
    scene (`Scene`): what it shows.
    questions (`list[Question]`).
    """

    path: Path
    scene: Scene
    questions: list[Question]


def write_video(path: str | os.PathLike, scene: Scene, split: str) -> None:
    """
    Renders a scene and encodes it with H.264.

    Args:
        path (`str` or `os.PathLike`): the file to write, with the ending `.mp4`.
        scene (`Scene`): drawn for this split.
        split (`str`): `"train"` or `"test"`.
    """
    frames = Renderer(split).render(lay_out([scene], [np.arange(scene.num_frames)], split), scene.seed)[0]
    crf = FIRST_CRF + (LAST_CRF - FIRST_CRF) * scene.quality
    # More threads, or adaptive quantisation of frames whose sides are no multiples of 16, give different bytes each
    # time.
    fixed = {"threads": "1", "x264-params": "aq-mode=0:mbtree=0"}
    options = {"crf": f"{crf:.1f}", "preset": "fast", **fixed}
    with av.open(os.fspath(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=scene.fps, options=options)
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = "yuv420p"
        for frame in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def build_benchmark(
    out: str | os.PathLike, num_videos: dict[str, int], split: str = "test", first_seed: int = 0, workers: int = 1
) -> Path:
    """
    Writes the files of a benchmark.

    Args:
        out (`str` or `os.PathLike`): the folder to make. It must not exist, but its parent must.
        num_videos (`dict[str, int]`): how many of each set.
        split (`str`, *optional*, defaults to `"test"`): the digit images and photographs that are used.
        first_seed (`int`, *optional*, defaults to 0): seed of the first scene of each set; the others follow.
        workers (`int`, *optional*, defaults to 1): processes that render and encode.

    Returns:
        `Path`: the folder.

    Raises:
        FileExistsError: if `out` exists.
        FileNotFoundError: if its parent does not.
        ValueError: if a number, the split or a seed is out of its range.
    """
    most = MAX_SEED - first_seed + 1
    for name, count in num_videos.items():
        draw_scene(name, split, first_seed)
        if not 0 <= count <= most:
            raise ValueError(f"The number of {name} videos must be from 0 to {most}, got {count}.")
    tasks = [(name, split, first_seed + i) for name, count in num_videos.items() for i in range(count)]
    with new_folder(out) as folder:
        with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            written = pool.map(_write_one, [folder] * len(tasks), tasks, chunksize=4)
            lines = list(tqdm(written, total=len(tasks), disable=not sys.stderr.isatty()))
        (folder / QUESTIONS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Path(out)


def _write_one(folder: Path, task: tuple[str, str, int]) -> dict:
    name, split, seed = task
    scene = draw_scene(name, split, seed)
    path = folder / f"{name}-{seed}.mp4"
    write_video(path, scene, split)
    questions = draw_questions(scene, np.random.default_rng(seed))
    return {
        "video": path.name,
        "set": name,
        "split": split,
        "seed": seed,
        "questions": [question._asdict() for question in questions],
    }


def read_benchmark(folder: str | os.PathLike) -> list[Video]:
    """
    Args:
        folder (`str` or `os.PathLike`): what `build_benchmark` made.

    Returns:
        `list[Video]`

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
    """
    folder = Path(folder)
    videos = []
    for line in (folder / QUESTIONS_FILE).read_text().splitlines():
        entry = json.loads(line)
        path = folder / entry["video"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, but {folder / QUESTIONS_FILE} names it.")
        scene = draw_scene(entry["set"], entry["split"], entry["seed"])
        videos.append(Video(path, scene, [Question(**question) for question in entry["questions"]]))
    return videos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to make; it must not exist")
    parser.add_argument("--num-videos", type=int, nargs=len(SETS), default=[250, 150, 250], metavar="N")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first scene of each set")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    try:
        folder = build_benchmark(args.out, dict(zip(SETS, args.num_videos)), args.split, args.seed, args.workers)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{folder}: {sum(args.num_videos)} videos")


if __name__ == "__main__":
    main()
