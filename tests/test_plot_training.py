import json
import sys

import pytest
from matplotlib.figure import Figure
from plot_training import draw, main, read_curves


HISTORY = [
    {"step": 1, "loss": 3.0, "language_loss": 2.9, "temporal_loss": 0.2, "kept_share": 0.5},
    {"step": 2, "loss": 0.1, "language_loss": 0.1, "temporal_loss": 0.0},
    {"step": 2, "eval_accuracy_0.5": 0.75, "eval_answers": 4},
]


def test_curves_by_name(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    curves = read_curves(tmp_path)
    assert curves["loss"] == [(1, 3.0), (2, 0.1)]
    assert curves["eval_accuracy_0.5"] == [(2, 0.75)]


def test_the_picture_shows_losses_accuracy_and_the_scorer(tmp_path, monkeypatch):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self) or save(self, *args))
    draw(read_curves(tmp_path), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    labels = {axes.get_title(): [line.get_label() for line in axes.lines] for axes in figures[0].axes}
    assert labels == {
        "loss": ["language loss", "temporal loss"],
        "accuracy": ["50 % pruned"],
        "scorer": ["kept share"],
    }


def test_a_folder_without_a_training_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot_training.py", str(tmp_path), str(tmp_path / "curve.png")])
    with pytest.raises(SystemExit, match=r"error: .*trainer_state\.json"):
        main()
