import numpy as np
import pytest
import torch
from render import PHOTOS, Renderer, _canvases, _photo_tiles, compress, lay_out, sprite_path
from scenes import FRAME_SIZE, Scene, Sprite, draw_scene


@pytest.fixture(scope="module")
def renderer():
    return Renderer("train")


def render(renderer, scene, frames=None, seed=0):
    frames = np.arange(scene.num_frames) if frames is None else np.array(frames)
    return renderer.render(lay_out([scene], [frames], "train"), seed)[0]


def still_scene(sprites, num_frames=6):
    return Scene("short", 0, num_frames, 2, np.full(4, 0.4), np.zeros((num_frames, 2)), 0.0, 1.0, tuple(sprites))


DIGIT = Sprite(3, 0.3, "red", 30.0, start=1.0, end=2.0, x=40.0, y=60.0, direction="right", speed=20.0)


def test_a_digit_is_painted_where_and_when_it_is_visible_and_nowhere_else(renderer):
    frames = render(renderer, still_scene([DIGIT])).float()
    difference = (frames - render(renderer, still_scene([])).float()).abs().sum(1)
    assert [bool(change.any()) for change in difference] == [False, False, True, True, False, False]
    for frame, centre_x in ((2, 40), (3, 50)):
        rows, columns = torch.nonzero(difference[frame] > 10).unbind(1)
        assert abs(columns.float().mean() - centre_x) < 3 and abs(rows.float().mean() - 60) < 3
        assert columns.max() - columns.min() < 42 and rows.max() - rows.min() < 42


def test_a_digit_has_its_colour(renderer):
    frame = render(renderer, still_scene([DIGIT]))[2]
    changed = (frame != render(renderer, still_scene([]))[2]).any(0)
    red, green, blue = frame[:, changed].float()
    assert ((red > 150) & (green < 90) & (blue < 90)).sum() > 40


def test_the_camera_moves_background_and_digit_together(renderer):
    scene = still_scene([DIGIT._replace(start=0.0, end=9.0, speed=0.0)])
    moved = scene._replace(jitter=np.array([[0.0, 0.0]] * 5 + [[4.0, 2.0]]))
    still, shaken = render(renderer, scene)[5].float(), render(renderer, moved)[5].float()
    assert (still[:, 2:, 4:] - shaken[:, :-2, :-4]).abs().max() <= 1


def test_sampled_frames_are_those_of_the_whole_video_but_for_noise(renderer):
    scene = draw_scene("short", "train", 4)._replace(noise=0.0)
    assert torch.equal(render(renderer, scene)[[2, 7, 11]], render(renderer, scene, [2, 7, 11]))


def test_the_same_seed_gives_the_same_noise_and_another_another(renderer):
    scene = draw_scene("short", "train", 4)._replace(noise=4.0)
    assert torch.equal(render(renderer, scene, [0, 1]), render(renderer, scene, [0, 1]))
    noise = render(renderer, scene, [0, 1], seed=1).float() - render(renderer, scene, [0, 1]).float()
    assert 4 < noise.std() < 7


def test_scenes_are_rendered_beside_each_other_as_alone(renderer):
    scenes = [draw_scene("short", "train", seed)._replace(noise=0.0) for seed in (1, 2, 3)]
    frames = [np.arange(3)] * 3
    together = renderer.render(lay_out(scenes, frames, "train"), 0)
    assert together.shape == (3, 3, 3, FRAME_SIZE, FRAME_SIZE) and together.dtype == torch.uint8
    for scene, video in zip(scenes, together):
        assert torch.equal(video, render(renderer, scene, [0, 1, 2]))


def test_train_and_test_share_no_digit_image_and_no_photograph():
    assert not set(PHOTOS["train"]) & set(PHOTOS["test"])
    images = {split: {canvas.numpy().tobytes() for canvas in _canvases(split)[0]} for split in PHOTOS}
    assert not images["train"] & images["test"]
    labels = {split: _canvases(split)[1] for split in PHOTOS}
    assert all(set(labels[split]) == set(range(-1, 10)) for split in PHOTOS)
    tiles = {split: {tile.numpy().tobytes() for tile in _photo_tiles(split)} for split in PHOTOS}
    assert not tiles["train"] & tiles["test"]


def test_a_path_by_hand():
    centre, is_visible = sprite_path(DIGIT, np.array([0.5, 1.0, 1.5, 2.0]))
    assert centre.tolist() == [[30.0, 60.0], [40.0, 60.0], [50.0, 60.0], [60.0, 60.0]]
    assert is_visible.tolist() == [False, True, True, False]


def test_compression_loses_more_at_lower_quality():
    frames = render(Renderer("train"), draw_scene("short", "train", 0), [0, 5])[None]
    lost = [
        (compress(frames, torch.tensor([quality])).float() - frames.float()).square().mean()
        for quality in (0.0, 0.5, 1.0)
    ]
    assert lost[0] > lost[1] > lost[2] > 0
    assert lost[0] < 200
    flat = torch.full((1, 1, 3, FRAME_SIZE, FRAME_SIZE), 128, dtype=torch.uint8)
    assert torch.equal(compress(flat, torch.tensor([0.0])), flat)
