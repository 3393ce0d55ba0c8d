"""Turns scenes into frames: real handwriting over real photographs, on any device."""

import functools
import math
from typing import NamedTuple

import numpy as np
import skimage.data
import torch
from scenes import COLOURS, DIRECTIONS, FRAME_SIZE, Scene, Sprite
from sklearn.datasets import load_digits, load_sample_image
from torch.nn import functional as F


# The digit images from this one on, and these photographs, are for testing alone.
FIRST_TEST_DIGIT = 1300
PHOTOS = {
    "train": [
        "astronaut",
        "brick",
        "camera",
        "china.jpg",
        "coffee",
        "grass",
        "hubble_deep_field",
        "immunohistochemistry",
        "moon",
        "retina",
        "rocket",
        "stereo_motorcycle",
    ],
    "test": ["cat", "cell", "coins", "flower.jpg", "gravel"],
}
TILE_SIZE = 256  # pixels of a photograph's shorter side
MARGIN = 10  # pixels around a frame, for the camera's jitter
CANVAS_SIZE, GLYPH_SIZE = 16, 12  # texels of a sprite, and of the digit in its middle


class Layout(NamedTuple):
    """
    Where everything stands in the frames of some scenes; all that is left to do is to paint it. Made by `lay_out`.

    background (`np.ndarray` of shape `(num_scenes, 4)`): tile, corner (x, y) in the tile's pixels, pixels of the tile
        for each pixel of the frame.
    jitter (`np.ndarray` of shape `(num_scenes, num_frames, 2)`): how far the camera is off, in pixels.
    noise, quality (`np.ndarray` of shape `(num_scenes,)`): see `Scene`.
    canvas (`np.ndarray` of shape `(num_scenes, num_sprites)`): index of each sprite's canvas.
    colour (`np.ndarray` of shape `(num_scenes, num_sprites, 3)`): RGB.
    texel (`np.ndarray` of shape `(num_scenes, num_sprites)`): pixels that a texel of the canvas covers.
    centre (`np.ndarray` of shape `(num_scenes, num_sprites, num_frames, 2)`): in pixels, x first, without the jitter.
    visible (`np.ndarray` of shape `(num_scenes, num_sprites, num_frames)`): 1 = visible; also pads short lists.
    """

    background: np.ndarray
    jitter: np.ndarray
    noise: np.ndarray
    quality: np.ndarray
    canvas: np.ndarray
    colour: np.ndarray
    texel: np.ndarray
    centre: np.ndarray
    visible: np.ndarray


def lay_out(scenes: list[Scene], frames: list[np.ndarray], split: str) -> Layout:
    """
    Args:
        scenes (`list[Scene]`): any number.
        frames (`list[np.ndarray]`): indices of the frames to render of each scene, as many for each.
        split (`str`): `"train"` or `"test"`: the digit images and photographs.
    """
    choice = np.stack([scene.photo for scene in scenes])
    side = FRAME_SIZE + 2 * MARGIN
    size = side + choice[:, 3:] * (TILE_SIZE - side)
    tile = np.floor(choice[:, :1] * 2 * len(PHOTOS[split]))
    num_scenes, num_frames = len(scenes), len(frames[0])
    num_sprites = max(len(scene.sprites) for scene in scenes)
    shape = (num_scenes, num_sprites)
    layout = Layout(
        background=np.concatenate([tile, choice[:, 1:3] * (TILE_SIZE - size), size / side], axis=1),
        jitter=np.stack([scene.jitter[idx] for scene, idx in zip(scenes, frames)]),
        noise=np.array([scene.noise for scene in scenes]),
        quality=np.array([scene.quality for scene in scenes]),
        canvas=np.zeros(shape, dtype=np.int64),
        colour=np.zeros((*shape, 3)),
        texel=np.ones(shape),
        centre=np.zeros((*shape, num_frames, 2)),
        visible=np.zeros((*shape, num_frames)),
    )
    canvases_of_label = _canvases_of_label(split)
    for row, (scene, idx) in enumerate(zip(scenes, frames)):
        for i, sprite in enumerate(scene.sprites):
            choices = canvases_of_label[sprite.label]
            layout.canvas[row, i] = choices[int(sprite.variant * len(choices))]
            layout.colour[row, i] = COLOURS.get(sprite.colour, (255, 255, 255))
            layout.texel[row, i] = sprite.size / (GLYPH_SIZE if sprite.label >= 0 else CANVAS_SIZE)
            layout.centre[row, i], layout.visible[row, i] = sprite_path(sprite, idx / scene.fps)
    return layout


class Renderer:
    """
    Paints the frames of layouts of one split.

    Args:
        split (`str`): `"train"` or `"test"`.
        device (`torch.device` or `str`): where frames are computed.
    """

    def __init__(self, split: str, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.tiles = _photo_tiles(split).to(self.device)
        self.canvases = _canvases(split)[0].to(self.device)

    def render(self, layout: Layout, seed: int) -> torch.Tensor:
        """
        Args:
            layout (`Layout`): what is to be painted.
            seed (`int`): seed of the sensor noise.

        Returns:
            `torch.Tensor` of shape `(num_scenes, num_frames, 3, height, width)`, uint8, RGB.
        """
        layout = Layout(*(torch.from_numpy(values).to(self.device, non_blocking=True) for values in layout))
        layout = Layout(*(values if values.dtype == torch.int64 else values.float() for values in layout))
        images = self._paint_backgrounds(layout)
        for i in range(layout.canvas.shape[1]):
            images = self._paint_sprite(images, layout, i)
        generator = torch.Generator(self.device).manual_seed(seed)
        noise = torch.randn(images.shape, device=self.device, generator=generator)
        return (images + layout.noise.view(-1, 1, 1, 1, 1) * noise).clamp(0, 255).round().byte()

    def _paint_backgrounds(self, layout: Layout) -> torch.Tensor:
        """A section of a photograph for each scene, which moves against the camera."""
        tile, corner, step = layout.background.split([1, 2, 1], dim=1)
        section = _sample(self.tiles[tile[:, 0].long()].float(), corner, step[:, 0], FRAME_SIZE + 2 * MARGIN)
        num_scenes, num_frames = layout.jitter.shape[:2]
        section = section[:, None].expand(-1, num_frames, -1, -1, -1).flatten(0, 1)
        corner = (MARGIN + layout.jitter).flatten(0, 1)
        frames = _sample(section, corner, torch.ones_like(corner[:, 0]), FRAME_SIZE)
        return frames.unflatten(0, (num_scenes, num_frames))

    def _paint_sprite(self, images: torch.Tensor, layout: Layout, i: int) -> torch.Tensor:
        """Paints the i-th sprite of every scene."""
        canvas = self.canvases[layout.canvas[:, i]]
        canvas = torch.cat([canvas[:, :3] * layout.colour[:, i, :, None, None], canvas[:, 3:]], dim=1)
        visible = layout.visible[:, i]
        canvas = canvas[:, None].expand(-1, visible.shape[1], -1, -1, -1).flatten(0, 1)
        texel = layout.texel[:, i, None].expand_as(visible)
        corner = CANVAS_SIZE / 2 - (layout.centre[:, i] - layout.jitter) / texel[..., None]
        painted = _sample(canvas, corner.flatten(0, 1), 1 / texel.flatten(), FRAME_SIZE)
        painted = painted.unflatten(0, visible.shape) * visible[..., None, None, None]
        return images * (1 - painted[:, :, 3:]) + painted[:, :, :3]


def sprite_path(sprite: Sprite, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Args:
        sprite (`Sprite`): what moves.
        times (`np.ndarray` of shape `(num_frames,)`): in seconds.

    Returns:
        `tuple`: centres of shape `(num_frames, 2)` in pixels, x first, and whether the sprite is visible, of shape
        `(num_frames,)`, bool.
    """
    travelled = sprite.speed * (times - sprite.start)
    start, step = np.array([sprite.x, sprite.y]), np.array(DIRECTIONS[sprite.direction])
    return start + travelled[:, None] * step, (times >= sprite.start) & (times < sprite.end)


def compress(frames: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """
    Artefacts like a video codec's: half the resolution of colour, and rounded coefficients of 8 x 8 blocks.

    Args:
        frames (`torch.Tensor` of shape `(num_scenes, num_frames, 3, height, width)`, uint8).
        quality (`torch.Tensor` of shape `(num_scenes,)`): in [0, 1]; 0 = strongest.

    Returns:
        `torch.Tensor` of the same shape and dtype.
    """
    num_scenes, num_frames, _, height, width = frames.shape
    to_ycc = frames.new_tensor(_RGB_TO_YCC, dtype=torch.float32)
    planes = torch.einsum("ij,bfjhw->ibfhw", to_ycc, frames.float() - 128).flatten(1, 2)
    step = (4 + 26 * (1 - quality)).repeat_interleave(num_frames).view(-1, 1, 1)
    luma = _round_blocks(planes[0], step)
    chroma = F.avg_pool2d(planes[1:], 2)
    chroma = torch.stack([_round_blocks(plane, 1.5 * step) for plane in chroma])
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear")
    planes = torch.cat([luma[None], chroma]).unflatten(1, (num_scenes, num_frames))
    rgb = torch.einsum("ji,ibfhw->bfjhw", torch.linalg.inv(to_ycc), planes) + 128
    return rgb.clamp(0, 255).round().byte()


_RGB_TO_YCC = [[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]]


def _round_blocks(planes: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Rounds the cosine transform of 8 x 8 blocks to multiples of `step`, coarser for higher frequencies."""
    height, width = planes.shape[-2:]
    planes = F.pad(planes[None], (0, -width % 8, 0, -height % 8), mode="replicate")[0]
    k = torch.arange(8, device=planes.device)
    basis = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    blocks = planes.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).transpose(2, 3)
    coefficients = basis @ blocks @ basis.T
    steps = step[..., None, None] * (0.5 + (k[:, None] + k) / 7)
    blocks = basis.T @ ((coefficients / steps).round() * steps) @ basis
    return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]


def _sample(images: torch.Tensor, corner: torch.Tensor, step: torch.Tensor, size: int) -> torch.Tensor:
    """
    Cuts square sections of shape `(n, channels, size, size)` out of images, whose pixels lie `step` apart and begin
    at `corner` (x, y), both in the images' pixels. What lies outside is 0.
    """
    grid = corner[:, None] + (torch.arange(size, device=images.device) + 0.5)[None, :, None] * step[:, None, None]
    grid = 2 * grid / images.shape[-1] - 1
    grid = torch.stack([grid[:, None, :, 0].expand(-1, size, -1), grid[:, :, None, 1].expand(-1, -1, size)], dim=-1)
    return F.grid_sample(images, grid, align_corners=False)


@functools.cache
def _canvases(split: str) -> tuple[torch.Tensor, np.ndarray]:
    """
    Every sprite there is: white times opacity in [0, 1], and opacity, of shape
    `(num_canvases, 4, CANVAS_SIZE, CANVAS_SIZE)`; and their labels, -1 for pieces of photographs.
    """
    digits = load_digits()
    part = slice(FIRST_TEST_DIGIT) if split == "train" else slice(FIRST_TEST_DIGIT, None)
    glyphs = torch.from_numpy(digits.images[part] / 16).float()[:, None]
    glyphs = (1.3 * F.interpolate(glyphs, size=GLYPH_SIZE, mode="bilinear")).clamp(0, 1)
    glyphs = F.pad(glyphs, ((CANVAS_SIZE - GLYPH_SIZE) // 2,) * 4)
    # A dark rim keeps every colour readable on every photograph.
    rim = F.avg_pool2d(F.max_pool2d(glyphs, 3, 1, 1), 3, 1, 1)
    glyphs = torch.cat([glyphs.expand(-1, 3, -1, -1), torch.maximum(glyphs, 0.8 * rim)], dim=1)
    pieces = F.avg_pool2d(_photo_tiles(split).float() / 255, 4)
    pieces = pieces.unfold(2, CANVAS_SIZE, CANVAS_SIZE).unfold(3, CANVAS_SIZE, CANVAS_SIZE)
    pieces = pieces.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    axis = (torch.arange(CANVAS_SIZE) + 0.5) / CANVAS_SIZE * 2 - 1
    opacity = (4 * (1 - (axis[:, None] ** 2 + axis**2).sqrt())).clamp(0, 1).expand(len(pieces), 1, -1, -1)
    canvases = torch.cat([glyphs, torch.cat([pieces * opacity, opacity], dim=1)])
    return canvases, np.append(digits.target[part], np.full(len(pieces), -1))


@functools.cache
def _canvases_of_label(split: str) -> dict[int, np.ndarray]:
    """Indices of the canvases of each label."""
    labels = _canvases(split)[1]
    return {label: np.flatnonzero(labels == label) for label in range(-1, 10)}


@functools.cache
def _photo_tiles(split: str) -> torch.Tensor:
    """Both ends of every photograph, of shape `(num_tiles, 3, TILE_SIZE, TILE_SIZE)`, uint8."""
    tiles = []
    for name in PHOTOS[split]:
        photo = load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
        photo = photo[0] if isinstance(photo, tuple) else photo
        photo = photo if photo.ndim == 3 else np.repeat(photo[:, :, None], 3, axis=2)
        image = torch.tensor(photo[:, :, :3]).permute(2, 0, 1)[None].float()
        scale = TILE_SIZE / min(image.shape[2:])
        size = [max(TILE_SIZE, round(side * scale)) for side in image.shape[2:]]
        image = F.interpolate(image, size=size, mode="bilinear", antialias=True)[0].round().byte()
        tiles += [image[:, :TILE_SIZE, :TILE_SIZE], image[:, -TILE_SIZE:, -TILE_SIZE:]]
    return torch.stack(tiles)
