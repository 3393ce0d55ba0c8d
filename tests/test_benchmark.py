import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark import QUESTIONS_FILE, build_benchmark, read_benchmark
from render import Renderer, lay_out

from modeling_stts.stts_video import read_video


SCRIPT = Path(__file__).parents[1] / "examples" / "moving_digits" / "benchmark.py"
NUM_VIDEOS = {"short": 2, "long": 1, "detail": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_benchmark(tmp_path_factory.mktemp("benchmark") / "videos", NUM_VIDEOS, first_seed=7)


def test_every_video_has_a_file_and_questions(folder):
    videos = read_benchmark(folder)
    assert [video.scene.name for video in videos] == ["short", "short", "long", "detail", "detail"]
    assert [video.scene.seed for video in videos] == [7, 8, 7, 7, 8]
    assert {path.name for path in folder.iterdir()} == {video.path.name for video in videos} | {QUESTIONS_FILE}
    assert all(len(video.questions) >= 2 for video in videos)


def test_files_decode_to_about_what_was_rendered(folder):
    for video in read_benchmark(folder):
        frames, metadata = read_video(video.path)
        assert len(frames) == video.scene.num_frames and metadata.fps == video.scene.fps
        layout = lay_out([video.scene], [np.arange(video.scene.num_frames)], "test")
        rendered = Renderer("test").render(layout, video.scene.seed)[0].permute(0, 2, 3, 1)
        error = (rendered.float() - torch.from_numpy(frames).float()).square().mean()
        assert error < 150
        wrong_frames = (rendered[0].float() - torch.from_numpy(frames[-1]).float()).square().mean()
        assert wrong_frames > error


def test_the_same_arguments_give_the_same_bytes(folder, tmp_path):
    again = build_benchmark(tmp_path / "videos", {"short": 2, "long": 0, "detail": 2}, first_seed=7, workers=2)
    for path in again.iterdir():
        if path.name != QUESTIONS_FILE:
            assert path.read_bytes() == (folder / path.name).read_bytes()
    assert set(again.joinpath(QUESTIONS_FILE).read_text().splitlines()) < set(
        folder.joinpath(QUESTIONS_FILE).read_text().splitlines()
    )


def test_a_folder_that_exists_stays_as_it_is(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="exists"):
        build_benchmark(folder, {"short": 1})
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_parent_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="parent .*none does not exist"):
        build_benchmark(tmp_path / "none" / "videos", {"short": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_videos": {"short": -1}}, "short videos must be from 0 .* got -1"),
        ({"num_videos": {"tall": 1}}, "one of .*'short'.* got 'tall'"),
        ({"num_videos": {"short": 1}, "split": "dev"}, "one of .*'train'.* got 'dev'"),
        ({"num_videos": {"short": 1}, "first_seed": -5}, "from 0 to .* got -5"),
    ],
)
def test_bad_arguments_leave_nothing_behind(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_benchmark(tmp_path / "videos", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(folder, tmp_path):
    (tmp_path / QUESTIONS_FILE).write_text((folder / QUESTIONS_FILE).read_text())
    with pytest.raises(FileNotFoundError, match="short-7.mp4 is missing"):
        read_benchmark(tmp_path)


def test_the_command_line(tmp_path):
    command = [sys.executable, SCRIPT, tmp_path / "videos", "--num-videos", "1", "0", "1", "--workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "2 videos" in result.stdout
    line = json.loads((tmp_path / "videos" / QUESTIONS_FILE).read_text().splitlines()[0])
    assert line["video"] == "short-0.mp4" and line["questions"][0].keys() == {"kind", "text", "answer", "num_choices"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and "exists" in result.stderr and result.stderr.count("\n") == 1
