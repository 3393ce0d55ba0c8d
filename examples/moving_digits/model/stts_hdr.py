"""Makes pictures of high dynamic range (BT.2020 with PQ or HLG) into ordinary ones. Knows no files."""

from functools import lru_cache

import numpy as np


# Names of FFmpeg's `color_trc`: SMPTE ST 2084 (PQ) and ARIB STD-B67 (HLG).
PQ, HLG = 16, 18
# In candelas a square meter: what is shown as white paper (ITU-R BT.2408), and what becomes the brightest value.
PAPER_WHITE, PEAK = 203, 1000
# Up to here, as a share of paper white, light stays as it is; what is brighter is compressed.
KNEE = 0.5
# From the primaries of BT.2020 to those of BT.709, for linear light (ITU-R BT.2087, inverse of its table).
BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)
# Ordinary displays show a value to this power (ITU-R BT.1886).
DISPLAY_GAMMA = 2.4


def to_sdr(image: np.ndarray, transfer: int) -> np.ndarray:
    """
    Compresses bright light, so that mid-tones stay as they are and highlights differ from white.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`, uint16): RGB in BT.2020 as it is coded, 0 to 65535.
        transfer (`int`): `PQ` or `HLG`.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`, uint8: RGB in BT.709.
    """
    light = _light(transfer)[image >> 4]
    # By the largest of the three, so that their proportions stay. `max` takes eight times as long along a short axis.
    brightest = np.maximum(np.maximum(light[..., :1], light[..., 1:2]), light[..., 2:])
    light *= _compress(brightest) / np.maximum(brightest, 1e-6)
    light = (light @ BT2020_TO_BT709.T).clip(0, 1)
    return _codes()[(np.sqrt(light) * 4095 + 0.5).astype(np.uint16)]


@lru_cache
def _light(transfer: int) -> np.ndarray:
    """Light of each of 4096 code values, as a share of paper white."""
    code = np.arange(4096) / 4095
    if transfer == PQ:
        # ITU-R BT.2100, table 4.
        root = code ** (32 / 2523)
        light = 10000 * (np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)
    else:
        # ITU-R BT.2100, table 5, on a display of 1000 candelas; the power is of each color, not of the luminance.
        scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        light = 1000 * scene**1.2
    return (light / PAPER_WHITE).astype(np.float32)


def _compress(light: np.ndarray) -> np.ndarray:
    """Reinhard's curve above the knee: it goes on with the same slope and reaches 1 at the peak."""
    peak = (PEAK / PAPER_WHITE - KNEE) / (1 - KNEE)
    above = np.clip((light - KNEE) / (1 - KNEE), 0, peak)
    return np.minimum(light, KNEE) + (1 - KNEE) * above * (1 + above / peak**2) / (1 + above)


@lru_cache
def _codes() -> np.ndarray:
    """Code values of 4096 square roots of light."""
    return np.round(255 * np.linspace(0, 1, 4096) ** (2 / DISPLAY_GAMMA)).astype(np.uint8)


__all__ = ["HLG", "PQ", "to_sdr"]
