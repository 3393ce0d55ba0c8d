import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from render import sprite_path
from scenes import FRAME_SIZE, MAX_SEED, SETS, Scene, Sprite, describe, draw_picture, draw_questions, draw_scene


def hand_made_scene(name, sprites, num_frames=16, fps=2):
    return Scene(name, 0, num_frames, fps, np.zeros(4), np.zeros((num_frames, 2)), 0.0, 1.0, tuple(sprites))


SEVEN = Sprite(7, 0.0, "red", 24.0, start=3.0, end=5.0, x=20.0, y=80.0, direction="right", speed=10.0)
TWO = Sprite(2, 0.5, "blue", 30.0, start=1.0, end=6.0, x=70.0, y=30.0, direction="still", speed=0.0)
SMALL = Sprite(4, 0.5, "green", 10.0, start=2.0, end=6.0, x=40.0, y=50.0, direction="still", speed=0.0)
BLOB = Sprite(-1, 0.5, "", 30.0, start=0.0, end=9.0, x=50.0, y=50.0, direction="up", speed=5.0)


def answers(scene, seeds=20):
    """Every question that is asked about a scene, and its answer and number of choices."""
    asked = [q for seed in range(seeds) for q in draw_questions(scene, np.random.default_rng(seed))]
    return {(q.kind, q.text): (q.answer, q.num_choices) for q in asked}


def test_answers_about_a_hand_made_short_scene():
    assert answers(hand_made_scene("short", [BLOB, SEVEN, TWO])) == {
        ("digit", "Which digit is red?"): ("7", 10),
        ("digit", "Which digit is blue?"): ("2", 10),
        ("colour", "What colour is the 7?"): ("red", 6),
        ("colour", "What colour is the 2?"): ("blue", 6),
        ("direction", "Which way does the 7 move?"): ("right", 5),
        ("direction", "Which way does the 2 move?"): ("still", 5),
        ("place", "Where does the 7 appear?"): ("bottom-left", 4),
        ("place", "Where does the 2 appear?"): ("top-right", 4),
        ("time", "At which second does the 7 appear?"): ("3", 8),
        ("time", "At which second does the 2 appear?"): ("1", 8),
        ("count", "How many digits appear?"): ("2", 4),
        ("first", "Which digit appears first?"): ("2", 10),
        ("order", "Which appears first, the 2 or the 7?"): ("2", 2),
        ("order", "Which appears first, the 7 or the 2?"): ("2", 2),
    }


def test_answers_about_a_hand_made_long_scene():
    late = TWO._replace(start=40.0, end=42.0)
    scene = hand_made_scene("long", [late, SEVEN], num_frames=256, fps=4)
    assert answers(scene) == {
        ("brief digit", "Which digit is red?"): ("7", 10),
        ("brief digit", "Which digit is blue?"): ("2", 10),
        ("appearances", "How many digits appear?"): ("2", 4),
        ("far order", "Which appears first, the 7 or the 2?"): ("7", 2),
        ("far order", "Which appears first, the 2 or the 7?"): ("7", 2),
    }
    near = hand_made_scene("long", [late._replace(start=10.0, end=12.0), SEVEN], num_frames=256, fps=4)
    assert not any(kind == "far order" for kind, _ in answers(near))


def test_answers_about_a_hand_made_detail_scene():
    assert answers(hand_made_scene("detail", [TWO, SMALL])) == {
        ("small digit", "Which digit is small?"): ("4", 10),
        ("point", "Point at the small digit."): ("c3", 36),
    }


def test_a_description_names_every_digit_in_order():
    assert describe(hand_made_scene("short", [SEVEN, TWO])).answer == (
        "A blue 2 appears at second 1, top-right, standing still. "
        "A red 7 appears at second 3, bottom-left, moving right."
    )


@pytest.mark.parametrize("name", SETS)
def test_the_same_arguments_give_the_same_scene_and_others_another(name):
    def drawn(*args):
        scene = draw_scene(*args)
        return scene.sprites, scene.photo.tolist(), scene.jitter.tolist()

    assert drawn(name, "train", 5) == drawn(name, "train", 5)
    assert drawn(name, "train", 5) != drawn(name, "test", 5)
    assert drawn(name, "train", 5) != drawn(name, "train", 6)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SETS), st.sampled_from(("train", "test")), st.integers(0, MAX_SEED))
def test_digits_stay_in_the_frame_and_in_the_video(name, split, seed):
    scene = draw_scene(name, split, seed)
    times = np.arange(scene.num_frames) / scene.fps
    digits = scene.digits
    assert 1 <= len(digits) <= 4
    assert len({digit.label for digit in digits}) == len({digit.colour for digit in digits}) == len(digits)
    for digit in digits:
        centre, is_visible = sprite_path(digit, times)
        assert is_visible.sum() >= 3
        assert 0 <= digit.start < digit.end <= scene.num_frames / scene.fps
        assert (centre[is_visible] - digit.size / 2 >= -1e-6).all()
        assert (centre[is_visible] + digit.size / 2 <= FRAME_SIZE + 1e-6).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, MAX_SEED))
def test_long_scenes_show_one_digit_at_a_time(seed):
    digits = draw_scene("long", "train", seed).digits
    assert all(earlier.end <= later.start for earlier, later in zip(digits, digits[1:]))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, MAX_SEED))
def test_digits_of_a_picture_do_not_cover_each_other(seed):
    digits = draw_picture("train", seed).digits
    assert 1 <= len(digits) <= 6
    for i, digit in enumerate(digits):
        for other in digits[:i]:
            distance = max(abs(digit.x - other.x), abs(digit.y - other.y))
            assert distance >= (digit.size + other.size) / 2 - 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tall", "train", 0), "one of .*'short'.* got 'tall'"),
        (("short", "dev", 0), "one of .*'train'.* got 'dev'"),
        (("short", "train", -1), "from 0 to .* got -1"),
        (("short", "train", 2**31), "from 0 to .* got 2147483648"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_scene(*arguments)
