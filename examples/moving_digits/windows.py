"""Which windows of a frame show which digit: geometry alone."""

import numpy as np
from render import sprite_path
from scenes import CELL_SIZE, COLOURS, GRID, Scene, Sprite


ENOUGH = 0.25  # of a window, or of a digit that is smaller


def sprite_cover(sprite: Sprite, times: np.ndarray) -> np.ndarray:
    """
    Area that a sprite's square covers of every window. The camera's jitter is left out.

    Args:
        sprite (`Sprite`): what moves.
        times (`np.ndarray` of shape `(num_frames,)`): in seconds.

    Returns:
        `np.ndarray` of shape `(num_frames, num_windows)`: square pixels, 0 where the sprite is not visible.
    """
    centre, is_visible = sprite_path(sprite, times)
    edges = np.arange(GRID) * CELL_SIZE
    low, high = centre - sprite.size / 2, centre + sprite.size / 2
    overlap = np.minimum(high[..., None], edges + CELL_SIZE) - np.maximum(low[..., None], edges)
    x, y = overlap.clip(0).transpose(1, 0, 2)
    return (y[:, :, None] * x[:, None, :]).reshape(len(times), GRID**2) * is_visible[:, None]


def window_labels(scene: Scene, times: np.ndarray) -> np.ndarray:
    """
    What every window shows: the digit that covers most of it, if it covers enough.

    Args:
        scene (`Scene`): what is seen.
        times (`np.ndarray` of shape `(num_frames,)`): in seconds.

    Returns:
        `np.ndarray` of shape `(num_frames, num_windows, 2)`, int64: 1 + digit and 1 + number of the colour; 0 = none.
    """
    covers = np.stack([sprite_cover(digit, times) for digit in scene.digits])
    smallest = [ENOUGH * min(CELL_SIZE, digit.size) ** 2 for digit in scene.digits]
    covers = np.where(covers >= np.reshape(smallest, (-1, 1, 1)), covers, 0)
    classes = [(1 + digit.label, 1 + list(COLOURS).index(digit.colour)) for digit in scene.digits]
    return np.where(covers.max(0)[..., None] > 0, np.array(classes)[covers.argmax(0)], 0)
