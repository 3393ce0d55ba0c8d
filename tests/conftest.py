"""Fixtures that several test files share."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import run_hub
from huggingface_hub import constants

from hub_upload.build import build_hub_folder
from hub_upload.card import write_card
from hub_upload.check import check


# Tiny models gain nothing from more threads, and where the machine is busy they wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start

NUM_CLIP_FRAMES = 20
CLIP_FPS = 4


@pytest.fixture(autouse=True)
def fixed_seed():
    """Random weights and inputs of a test are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A hub folder with the tiny random model. Read only: all tests share it."""
    return build_hub_folder(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture(scope="session")
def checked_folder(tmp_path_factory) -> Path:
    """The tiny hub folder with a model card for user/tiny at v1, and a report beside it. Read only."""
    folder = build_hub_folder(tmp_path_factory.mktemp("checked") / "tiny")
    write_card(folder, "user/tiny", license="apache-2.0", revision="v1")
    check(folder)
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A real MP4 of 20 frames, 64 x 64 pixels, 4 frames a second: a bright square moves over a gradient."""
    import av  # numbers are also tested on machines without it

    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    gradient = np.linspace(0, 120, 64, dtype=np.uint8)
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=CLIP_FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(NUM_CLIP_FRAMES):
            image = np.broadcast_to(gradient[None, :, None], (64, 64, 3)).copy()
            image[20:36, 2 * i : 2 * i + 16] = (250, 200, 10 * i)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback, the only one that this process knows; the client's pauses before it tries again are short."""
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "good-token")
    pause = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: pause(min(seconds, 0.01)))
    with run_hub(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield hub
