import av
import numpy as np
import pytest
from clips import write_hdr_clip

from modeling_stts.stts_hdr import HLG, PAPER_WHITE, PQ, to_sdr
from modeling_stts.stts_video import read_video


def pq(candelas):
    """Code value in [0, 1] of light of up to 10,000 candelas a square meter (SMPTE ST 2084)."""
    power = (candelas / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(candelas):
    """Code value in [0, 1] of light of up to 1,000 candelas, on a display of so many (ITU-R BT.2100)."""
    scene = (candelas / 1000) ** (1 / 1.2)
    return np.sqrt(3 * scene) if scene <= 1 / 12 else 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073


def shown(code, transfer):
    """What becomes of one color, or of a gray, whose code values are in [0, 1]."""
    image = np.broadcast_to(np.round(65535 * np.array(code)), (2, 2, 3)).astype(np.uint16)
    return to_sdr(image, transfer)[0, 0].tolist()


@pytest.mark.parametrize("code, transfer", [(pq, PQ), (hlg, HLG)])
def test_gray_by_hand(code, transfer):
    # The knee is at half of paper white. Below it a display of ordinary range shows just that light.
    for share in (0, 0.01, 0.05, 0.18, 0.35, 0.5):
        red, green, blue = shown(code(share * PAPER_WHITE), transfer)
        assert red == green == blue == pytest.approx(255 * share ** (1 / 2.4), abs=1.5)
    assert shown(code(PAPER_WHITE), transfer) == pytest.approx([227] * 3, abs=1)
    assert shown(code(1000), transfer) == [255] * 3


def test_brighter_is_brighter_and_nothing_wraps_around():
    for transfer in (PQ, HLG):
        ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1).repeat(3, -1)
        gray = to_sdr(ramp, transfer)[..., 1].flatten().astype(int)
        assert (np.diff(gray) >= 0).all() and (gray[0], gray[-1]) == (0, 255)


def test_colors_by_hand():
    candelas = np.random.default_rng(0).uniform(1, 1000, (200, 3))
    for color in candelas:
        light, white = color / PAPER_WHITE, 1000 / PAPER_WHITE
        bright, peak = 2 * light.max() - 1, 2 * white - 1
        if bright > 0:
            light = light / light.max() * 0.5 * (1 + bright * (1 + bright / peak**2) / (1 + bright))
        red = 1.6605 * light[0] - 0.5876 * light[1] - 0.0728 * light[2]
        green = -0.1246 * light[0] + 1.1329 * light[1] - 0.0083 * light[2]
        blue = -0.0182 * light[0] - 0.1006 * light[1] + 1.1187 * light[2]
        expected = 255 * np.clip([red, green, blue], 0, 1) ** (1 / 2.4)
        assert shown(pq(color), PQ) == pytest.approx(expected.tolist(), abs=3)


def test_colors_stay_what_they_are():
    for color in np.eye(3):
        assert np.argmax(shown(pq(100 * color), PQ)) == np.argmax(color)
    # Red of BT.709 in light of BT.2020 (ITU-R BT.2087).
    red = shown(pq(100 * np.array([0.6274, 0.0691, 0.0164])), PQ)
    assert red[0] == pytest.approx(255 * (100 / PAPER_WHITE) ** (1 / 2.4), abs=3) and max(red[1:]) <= 12


LEVELS = [0, 5, 36.5, 101.5, PAPER_WHITE, 400, 1000, 1000]
EXPECTED = [0, 54, 125, 191, 227, 242, 255, 255]


@pytest.mark.parametrize("codec", ["libx265", "libsvtav1"])
@pytest.mark.parametrize("code, transfer", [(pq, PQ), (hlg, HLG)])
def test_files_of_high_dynamic_range(tmp_path, codec, code, transfer):
    clip = write_hdr_clip(tmp_path / "a.mkv", [code(level) for level in LEVELS], transfer, codec)
    frames, _ = read_video(clip)
    assert frames.dtype == np.uint8 and frames.shape == (3, 64, 128, 3)
    middles = frames[:, 32, 8::16].astype(int)
    assert np.abs(middles - np.array(EXPECTED)[:, None]).max() <= 4


def test_files_of_ordinary_range_stay_as_ffmpeg_gives_them(tmp_path):
    # 1: BT.709, 2: not said, 14: BT.2020 of ten bits with the ordinary curve.
    for transfer in (1, 2, 14):
        clip = write_hdr_clip(tmp_path / f"{transfer}.mkv", np.linspace(0, 1, 8), transfer, "libx265")
        with av.open(str(clip)) as container:
            expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert np.array_equal(read_video(clip)[0], expected)
