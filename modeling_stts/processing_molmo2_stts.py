"""Processor of Molmo2 with STTS."""

from typing import TYPE_CHECKING

from transformers.models.molmo2.processing_molmo2 import Molmo2Processor

from .stts_video import paths_as_strings


if TYPE_CHECKING:
    # Saving copies the files that this one imports.
    from .video_processing_molmo2_stts import Molmo2SttsVideoProcessor  # noqa: F401


class Molmo2SttsProcessor(Molmo2Processor):
    """
    Differences from `Molmo2Processor`: its video processor is a `Molmo2SttsVideoProcessor`, and videos may be given as
    `pathlib.Path`.
    """

    _auto_class = "AutoProcessor"

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        videos = paths_as_strings(videos)
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)


__all__ = ["Molmo2SttsProcessor"]
