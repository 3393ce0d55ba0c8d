import sys

import numpy as np
import pytest
import torch
from PIL import Image
from show_kept import BRIGHTNESS, GAP, contact_sheet, dim_dropped, main


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["show_kept.py", *map(str, args)])
        main()
        return capsys.readouterr().out

    return run


def test_dropped_windows_are_dimmed_and_kept_ones_are_not():
    frames = torch.full((1, 3, 6, 4), 200, dtype=torch.uint8)
    dimmed = dim_dropped(frames, torch.tensor([[1, 0, 0, 0, 1, 1]]), grid=(3, 2))
    dark = 200 * BRIGHTNESS
    expected = [[200, 200, dark, dark]] * 2 + [[dark] * 4] * 2 + [[200] * 4] * 2
    assert (dimmed[0] == torch.tensor(expected)).all()


def test_frames_stand_in_rows():
    sheet = np.asarray(contact_sheet(torch.arange(5).byte().view(5, 1, 1, 1).expand(5, 3, 2, 3), columns=2))
    assert sheet.shape == (3 * 2 + 2 * GAP, 2 * 3 + GAP, 3)
    assert [sheet[i // 2 * (2 + GAP), i % 2 * (3 + GAP), 0] for i in range(5)] == [0, 1, 2, 3, 4]
    assert (sheet[-2:, -3:] == 255).all()


def test_a_picture_of_a_real_file_has_as_many_bright_windows_as_the_model_keeps(run, tiny_folder, clip, tmp_path):
    for ratio, name in ((0, "all.png"), (0.5, "half.png")):
        args = ("--model", tiny_folder, "--num-frames", 4, "--columns", 4, "--prune-ratio", ratio)
        printed = run(clip, tmp_path / name, *args)
    assert "half.png: 162 of 324 windows kept in 4 frames" in printed
    pictures = [np.asarray(Image.open(tmp_path / name)).astype(float) for name in ("all.png", "half.png")]
    whole, half = (picture[:, : 4 * 64 + 3 * GAP] for picture in pictures)
    assert whole.shape == (64, 4 * 64 + 3 * GAP, 3)
    is_changed = np.abs(whole - half).max(-1) > 0
    assert not is_changed[:, :64].any()
    share = is_changed.sum() / (4 * 64 * 64)
    # Black pixels stay black, and windows are no whole pixels.
    assert 0.3 < share < 0.6


def test_bad_input_is_named_in_one_line(run, tiny_folder, tmp_path):
    with pytest.raises(SystemExit, match="^error: .*none.mp4 does not exist"):
        run(tmp_path / "none.mp4", tmp_path / "out.png", "--model", tiny_folder)
    assert not (tmp_path / "out.png").exists()
