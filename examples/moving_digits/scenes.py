"""Scenes of handwritten digits that move over photographs, and questions about them, drawn from seeds.

Knows no pixels: `render.py` turns scenes into frames.
"""

from typing import NamedTuple

import numpy as np


FRAME_SIZE = 108  # pixels, width and height
CELL_SIZE = 18  # pixels: a cell of the grid that "point" questions use, and a window of the model
GRID = FRAME_SIZE // CELL_SIZE  # cells in a row
SPLITS = ("train", "test")  # they share neither digit images nor photographs
SETS = ("short", "long", "detail")
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 250),
    "yellow": (245, 220, 40),
    "white": (250, 250, 250),
    "purple": (200, 60, 220),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
SHORT_LENGTHS = (16, 24, 32)  # frames
LONG_LENGTH, DETAIL_LENGTH = 256, 16
FPS = {"short": 2, "long": 4, "detail": 2}
MAX_DIGITS = 4  # of a video
PICTURE_DIGITS = 2  # that are asked about, of a picture's
PLACES_TRIED = 40  # for the digits of a picture
MAX_SEED = 2**31 - 1


class Sprite(NamedTuple):
    """
    Something that is visible for a while and moves in a straight line.

    label (`int`): the digit, 0 to 9; -1 for a distractor, a drifting piece of a photograph.
    variant (`float`): in [0, 1), says which image of this digit, or which piece.
    colour (`str`): a key of `COLOURS`; not used for distractors.
    size (`float`): height of the digit or diameter of the piece, in pixels.
    start, end (`float`): seconds; visible from `start` until just before `end`.
    x, y (`float`): centre at `start`, in pixels from the upper left corner.
    direction (`str`): a key of `DIRECTIONS`.
    speed (`float`): pixels a second.
    """

    label: int
    variant: float
    colour: str
    size: float
    start: float
    end: float
    x: float
    y: float
    direction: str
    speed: float


class Scene(NamedTuple):
    """
    One video.

    name (`str`): the set (`SETS`).
    seed (`int`): what it was drawn from, with the set and the split.
    num_frames (`int`), fps (`int`): length and rate of the video.
    photo (`np.ndarray` of shape `(4,)`): in [0, 1): which photograph, the corner of the section, and its zoom.
    jitter (`np.ndarray` of shape `(num_frames, 2)`): how far the camera is off, in pixels.
    noise (`float`): standard deviation of the sensor noise, in grey levels of 255.
    quality (`float`): in [0, 1]: 0 = strongest compression.
    sprites (`tuple[Sprite]`): painted in this order.
    """

    name: str
    seed: int
    num_frames: int
    fps: int
    photo: np.ndarray
    jitter: np.ndarray
    noise: float
    quality: float
    sprites: tuple[Sprite, ...]

    @property
    def digits(self) -> list[Sprite]:
        """The digits, in the order of their appearance."""
        return sorted((sprite for sprite in self.sprites if sprite.label >= 0), key=lambda sprite: sprite.start)


class Question(NamedTuple):
    """
    kind (`str`): what is asked, such as `"colour"`.
    text (`str`): the question.
    answer (`str`): one word; sentences for a description.
    num_choices (`int`): answers that are possible; chance level is one in so many. 0 for a description.
    """

    kind: str
    text: str
    answer: str
    num_choices: int


def draw_scene(name: str, split: str, seed: int) -> Scene:
    """
    Draws a scene; the same arguments give the same scene.

    Args:
        name (`str`): the set: `"short"`, `"long"` or `"detail"`.
        split (`str`): `"train"` or `"test"`.
        seed (`int`): from 0 to `MAX_SEED`.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if name not in SETS:
        raise ValueError(f"The set must be one of {SETS}, got {name!r}.")
    if split not in SPLITS:
        raise ValueError(f"The split must be one of {SPLITS}, got {split!r}.")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"The seed must be from 0 to {MAX_SEED}, got {seed}.")
    rng = np.random.default_rng([SPLITS.index(split), SETS.index(name), seed])
    num_frames = {"short": int(rng.choice(SHORT_LENGTHS)), "long": LONG_LENGTH, "detail": DETAIL_LENGTH}[name]
    duration = num_frames / FPS[name]
    digits = {"short": _short_digits, "long": _long_digits, "detail": _detail_digits}[name](rng, duration)
    distractors = [_distractor(rng, duration) for _ in range(rng.integers(0, 3))]
    return Scene(
        name,
        seed,
        num_frames,
        FPS[name],
        photo=rng.random(4),
        jitter=_camera_jitter(rng, num_frames),
        noise=rng.uniform(0, 6),
        quality=rng.random(),
        sprites=(*distractors, *digits),
    )


def draw_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """
    One question of each kind that a scene of this set allows, in random order.

    Args:
        scene (`Scene`): what is asked about.
        rng (`np.random.Generator`): decides which digit is asked about.
    """
    draw = {
        "short": _short_questions,
        "long": _long_questions,
        "detail": _detail_questions,
        "picture": _picture_questions,
    }[scene.name]
    questions = draw(scene, rng)
    return [questions[i] for i in rng.permutation(len(questions))]


def describe(scene: Scene) -> Question:
    """The whole scene in words, as a question with a long answer: more to learn from a video than one word."""
    sentences = [
        f"A {digit.colour} {digit.label} appears at second {int(digit.start)}, {_place(digit)}, "
        + ("standing still." if digit.direction == "still" else f"moving {digit.direction}.")
        for digit in scene.digits
    ]
    return Question("description", "What happens in this video?", " ".join(sentences), 0)


def draw_picture(split: str, seed: int, max_digits: int = len(COLOURS)) -> Scene:
    """
    A scene of one frame in which digits, large and small, stand beside each other: the most that can be learned from
    one look.

    Args:
        split (`str`), seed (`int`): as for `draw_scene`.
        max_digits (`int`, *optional*, defaults to 6): at most so many digits, one at least.
    """
    rng = np.random.default_rng([SPLITS.index(split), len(SETS), seed])
    labels, colours = rng.permutation(10), rng.permutation(list(COLOURS))
    digits: list[Sprite] = []
    num_digits = rng.integers(1, max_digits + 1)
    for _ in range(PLACES_TRIED):
        size = rng.uniform(9, 14) if rng.random() < 0.3 else rng.uniform(20, 36)
        x, y = rng.uniform(size / 2, FRAME_SIZE - size / 2, 2)
        distances = [max(abs(x - other.x), abs(y - other.y)) - (size + other.size) / 2 for other in digits]
        if min(distances, default=0) >= -2 and len(digits) < num_digits:
            label, colour = int(labels[len(digits)]), str(colours[len(digits)])
            digits.append(Sprite(label, rng.random(), colour, size, 0.0, 1.0, float(x), float(y), "still", 0.0))
    return Scene(
        "picture",
        seed,
        num_frames=1,
        fps=1,
        photo=rng.random(4),
        jitter=np.zeros((1, 2)),
        noise=rng.uniform(0, 6),
        quality=rng.random(),
        sprites=(_distractor(rng, 1.0), *digits),
    )


def _short_digits(rng: np.random.Generator, duration: float) -> list[Sprite]:
    """One to four digits that appear one after the other and stay for a while."""
    count = rng.integers(1, MAX_DIGITS + 1)
    starts = rng.choice(np.arange(1, int(duration) - 1), count, replace=False)
    if rng.random() < 0.15:
        starts[starts.argmin()] = 0
    spans = rng.integers(2, 7, count)
    labels, colours = rng.permutation(10), rng.permutation(list(COLOURS))
    return [
        _digit(rng, labels[i], colours[i], start=float(starts[i]), end=float(min(starts[i] + spans[i], duration)))
        for i in range(count)
    ]


def _long_digits(rng: np.random.Generator, duration: float) -> list[Sprite]:
    """One to four digits, each visible for a moment of a minute, never two at once."""
    count = rng.integers(1, MAX_DIGITS + 1)
    starts = rng.choice(np.arange(1, int(duration) - 4, 5), count, replace=False) + rng.uniform(0, 1, count)
    spans = rng.uniform(0.75, 4, count)
    labels, colours = rng.permutation(10), rng.permutation(list(COLOURS))
    return [
        _digit(rng, labels[i], colours[i], start=float(starts[i]), end=float(starts[i] + spans[i]))
        for i in range(count)
    ]


def _detail_digits(rng: np.random.Generator, duration: float) -> list[Sprite]:
    """A small digit that stays where it appears, and one or two of ordinary size."""
    labels, colours = rng.permutation(10), rng.permutation(list(COLOURS))
    cell = rng.integers(0, GRID, 2)
    x, y = (float(side) for side in cell * CELL_SIZE + rng.uniform(6, CELL_SIZE - 6, 2))
    start = float(rng.integers(1, int(duration) - 2))
    end = float(min(start + rng.integers(3, 7), duration))
    small = Sprite(
        int(labels[0]),
        rng.random(),
        str(colours[0]),
        rng.uniform(9, 12),
        start,
        end,
        x,
        y,
        direction="still",
        speed=0.0,
    )
    starts = rng.integers(0, int(duration) - 2, 2)
    others = [
        _digit(rng, labels[i], colours[i], start=float(starts[i - 1]), end=float(starts[i - 1] + 2))
        for i in range(1, 1 + rng.integers(1, 3))
    ]
    return [*others, small]


def _digit(rng: np.random.Generator, label: int, colour: str, start: float, end: float) -> Sprite:
    """A digit of ordinary size on a straight path that stays inside the frame and begins clearly in one quarter."""
    size = rng.uniform(22, 34)
    direction = str(rng.choice(list(DIRECTIONS)))
    dx, dy = DIRECTIONS[direction]
    low, high = size / 2, FRAME_SIZE - size / 2
    travel = rng.uniform(25, high - low - 8) if direction != "still" else 0.0
    while True:
        x, y = rng.uniform(low, high, 2)
        is_inside = low <= x + dx * travel <= high and low <= y + dy * travel <= high
        if is_inside and min(abs(x - FRAME_SIZE / 2), abs(y - FRAME_SIZE / 2)) > 5:
            break
    return Sprite(
        int(label), rng.random(), str(colour), size, start, end, float(x), float(y), direction, travel / (end - start)
    )


def _distractor(rng: np.random.Generator, duration: float) -> Sprite:
    """A piece of a photograph that drifts over the picture, possibly out of it."""
    start = rng.uniform(-duration, duration / 2)
    x, y = rng.uniform(0, FRAME_SIZE, 2)
    direction = str(rng.choice(list(DIRECTIONS)[:4]))
    speed = rng.uniform(20, FRAME_SIZE) / duration
    size = rng.uniform(20, 44)
    return Sprite(-1, rng.random(), "", size, start, start + duration * 1.5, float(x), float(y), direction, speed)


def _camera_jitter(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """A hand that shakes and comes back: an autoregressive walk, in a third of the videos none at all."""
    amplitude = max(0.0, rng.uniform(-0.75, 1.5))
    steps = rng.normal(size=(num_frames, 2))
    walk = np.zeros((num_frames, 2))
    for frame in range(1, num_frames):
        walk[frame] = 0.7 * walk[frame - 1] + 0.7 * steps[frame]
    return amplitude * walk


def _short_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    digits = scene.digits
    asked = [digits[i] for i in rng.integers(0, len(digits), 5)]
    questions = [
        _which_digit("digit", asked[0]),
        _which_colour(asked[1]),
        Question("direction", f"Which way does the {asked[2].label} move?", asked[2].direction, len(DIRECTIONS)),
        _which_place(asked[3]),
        Question(
            "time",
            f"At which second does the {asked[4].label} appear?",
            str(int(asked[4].start)),
            scene.num_frames // scene.fps,
        ),
        _how_many("count", digits),
        Question("first", "Which digit appears first?", str(digits[0].label), 10),
    ]
    if len(digits) > 1:
        questions.append(_which_of_two("order", digits, rng))
    return questions


def _long_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    digits = scene.digits
    asked = digits[rng.integers(0, len(digits))]
    questions = [_which_digit("brief digit", asked), _how_many("appearances", digits)]
    far_apart = [digits[0], digits[-1]]
    if far_apart[1].start - far_apart[0].start >= 15:
        questions.append(_which_of_two("far order", far_apart, rng))
    return questions


def _detail_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    small = min(scene.digits, key=lambda sprite: sprite.size)
    return [Question("small digit", "Which digit is small?", str(small.label), 10), _point(small, "small digit")]


def _picture_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    digits = [scene.digits[i] for i in rng.permutation(len(scene.digits))]
    questions = [_how_many("count", digits)]
    for digit in digits[:PICTURE_DIGITS]:
        questions += [_which_colour(digit), _which_place(digit), _point(digit, str(digit.label))]
    return questions + [_which_digit("digit", digit) for digit in digits[-PICTURE_DIGITS:]]


def _which_digit(kind: str, digit: Sprite) -> Question:
    return Question(kind, f"Which digit is {digit.colour}?", str(digit.label), 10)


def _which_colour(digit: Sprite) -> Question:
    return Question("colour", f"What colour is the {digit.label}?", digit.colour, len(COLOURS))


def _which_place(digit: Sprite) -> Question:
    return Question("place", f"Where does the {digit.label} appear?", _place(digit), len(PLACES))


def _point(digit: Sprite, name: str) -> Question:
    cell = f"{'abcdef'[int(digit.x // CELL_SIZE)]}{int(digit.y // CELL_SIZE) + 1}"
    return Question("point", f"Point at the {name}.", cell, GRID**2)


def _how_many(kind: str, digits: list[Sprite]) -> Question:
    return Question(kind, "How many digits appear?", str(len(digits)), MAX_DIGITS)


def _which_of_two(kind: str, digits: list[Sprite], rng: np.random.Generator) -> Question:
    one, other = (digits[i] for i in rng.permutation(len(digits))[:2])
    first = min(one, other, key=lambda digit: digit.start)
    return Question(kind, f"Which appears first, the {one.label} or the {other.label}?", str(first.label), 2)


def _place(digit: Sprite) -> str:
    return PLACES[2 * (digit.y > FRAME_SIZE / 2) + (digit.x > FRAME_SIZE / 2)]
