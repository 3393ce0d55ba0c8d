import numpy as np
import pytest
from scenes import Scene, Sprite
from windows import sprite_cover, window_labels


DIGIT = Sprite(7, 0.0, "green", 18.0, start=0.0, end=1.0, x=27.0, y=9.0, direction="right", speed=9.0)


def test_covered_areas_by_hand():
    cover = sprite_cover(DIGIT, np.array([0.0, 0.5, 1.0])).reshape(3, 6, 6)
    assert cover[0].nonzero() == (np.array([0]), np.array([1]))
    assert cover[0, 0, 1] == 18 * 18
    assert cover[1, 0, 1:3].tolist() == [13.5 * 18, 4.5 * 18]
    assert cover[1].sum() == 18 * 18
    assert not cover[2].any()


def test_a_sprite_that_leaves_the_frame_covers_less():
    half_out = DIGIT._replace(x=0.0, y=108.0)
    cover = sprite_cover(half_out, np.zeros(1)).reshape(6, 6)
    assert cover[5, 0] == cover.sum() == 81


def test_labels_by_hand():
    small = DIGIT._replace(label=0, colour="red", size=6.0, x=100.0, y=100.0)
    barely = DIGIT._replace(label=5, colour="blue", x=65.0, y=65.0)
    scene = Scene("picture", 0, 1, 1, np.zeros(4), np.zeros((1, 2)), 0.0, 1.0, (DIGIT, small, barely))
    labels = window_labels(scene, np.zeros(1)).reshape(6, 6, 2)
    shown = {(row, column): tuple(labels[row, column]) for row, column in zip(*labels[..., 0].nonzero())}
    # Green is colour 2 of 6, red 1, blue 3. The third digit covers a quarter of four windows at the least.
    assert shown[0, 1] == (8, 2)
    assert shown[5, 5] == (1, 1)
    assert shown[3, 3] == (6, 3)
    assert len(shown) == 2 + sum(area >= 81 for area in sprite_cover(barely, np.zeros(1))[0])


@pytest.mark.parametrize("times", [np.zeros(0), np.arange(3.0)])
def test_shapes(times):
    assert sprite_cover(DIGIT, times).shape == (len(times), 36)
