import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_upload.stranger import compare_with_native, load_config, load_model, load_processor, run_a_video
from hub_upload.tiny import tiny_config


IN_A_FRESH_PROCESS = """
import os, socket, subprocess, sys
from hub_upload.stranger import forbid_network_and_processes

forbid_network_and_processes()
subprocess.run(["true"])  # a library may
connect = "socket.socket().connect(('127.0.0.1', int(sys.argv[1])))"
codes = ["subprocess.run(['true'])", "os.system('true')", connect, "socket.getaddrinfo('localhost', 80)"]
for code in codes:
    try:
        exec(compile(code, "/cache/transformers_modules/tiny/modeling.py", "exec"))
    except PermissionError as error:
        print(error)
"""


def test_network_and_processes_are_forbidden():
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(server.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "a process was started: subprocess.Popen",
        "a process was started: os.system",
        "the network was used: socket.connect",
        "the network was used: socket.getaddrinfo",
    ], done.stderr


@pytest.mark.parametrize("change, kind", [("add", "unexpected_keys"), ("drop", "missing_keys")])
def test_weights_that_are_missing_or_too_many(tiny_folder, tmp_path, change, kind):
    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    if change == "add":
        weights["extra"] = torch.zeros(1)
    else:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"loading reports .*{kind}"):
        load_model(SimpleNamespace(folder=str(folder)))


@pytest.fixture(scope="module")
def state(tiny_folder):
    state = SimpleNamespace(folder=str(tiny_folder))
    for step in (load_config, load_model, load_processor, run_a_video):
        step(state)
    return state


def test_other_weights_are_not_native(state):
    assert compare_with_native(state) == "the same logits, bit by bit"
    with torch.no_grad():
        state.model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="not those of native Molmo2"):
        compare_with_native(state)
    with torch.no_grad():
        state.model.lm_head.weight[0, 0] -= 1


def test_a_video_that_is_not_pruned_is_noticed(state, monkeypatch):
    monkeypatch.setattr("hub_upload.stranger.PRUNE_RATIO", 0.0)
    with pytest.raises(ValueError, match="a prompt of 384 tokens was cut to 384"):
        run_a_video(state)


def test_the_video_is_long_enough_for_every_configuration(tiny_folder, state):
    late = SimpleNamespace(**vars(state))
    late.config = tiny_config(prune_from_frame=5)
    late.model.config.stts_config.prune_from_frame = 5
    assert "was cut to" in run_a_video(late)
    late.model.config.stts_config.prune_from_frame = 0
