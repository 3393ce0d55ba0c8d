"""Processor of Molmo2 with STTS."""

from typing import TYPE_CHECKING, Any

from transformers import BatchFeature, Molmo2Processor
from transformers.image_utils import ImageInput
from transformers.video_utils import VideoInput, is_valid_video, make_batched_videos

from .stts_video import paths_as_strings


if TYPE_CHECKING:
    # `save_pretrained` copies the files that this one imports.
    from .video_processing_molmo2_stts import Molmo2SttsVideoProcessor  # noqa: F401


class Molmo2SttsProcessor(Molmo2Processor):
    r"""
    Differences from `Molmo2Processor`:
    - Batches are padded, and on the left, as generation needs it, whatever the tokenizer's setting; a call's `padding`
      and `padding_side` replace that.
    - Videos may be path objects.
    - Lists of videos for each prompt are compared with that prompt's placeholders; natively only the sums are.
    """

    _auto_class = "AutoProcessor"

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: VideoInput | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Puts images and videos into prompts.

        Args:
            images: as for `Molmo2Processor`.
            text (`str` or `list[str]`, *optional*): prompts, with at most one video placeholder each.
            videos: as for `Molmo2SttsVideoProcessor`, in the order of the placeholders; or one list for each prompt.
            kwargs: as for `Molmo2Processor`, such as `num_frames`, `fps` and `max_fps` (frames per second).

        Returns:
            `BatchFeature`: with `input_ids`, `attention_mask` and `mm_token_type_ids` of shape
            `(batch_size, sequence_length)`, and what the image and video processors return.

        Raises:
            ValueError: if prompts and videos do not fit together or a video cannot be read.
        """
        videos = paths_as_strings(videos)
        if text is not None and isinstance(videos, list):
            self._check_video_counts([text] if isinstance(text, str) else text, videos)
        padding = {"padding": True, "padding_side": "left"}
        text_kwargs = {name: value for name, value in padding.items() if name not in kwargs}
        text_kwargs.update(kwargs.pop("text_kwargs", {}))
        return super().__call__(images=images, text=text, videos=videos, text_kwargs=text_kwargs, **kwargs)

    def _check_video_counts(self, text: list[str], videos: list[Any]) -> None:
        is_nested = all(isinstance(sample, list) and not is_valid_video(sample) for sample in videos)
        if not is_nested or len(videos) != len(text):
            return
        for row, (prompt, sample) in enumerate(zip(text, videos)):
            num_placeholders = prompt.count(self.video_token)
            num_videos = len(make_batched_videos(sample)) if sample else 0
            if num_placeholders != num_videos:
                raise ValueError(
                    f"Prompt {row} has {num_placeholders} {self.video_token} placeholders, but {num_videos} videos."
                )


__all__ = ["Molmo2SttsProcessor"]
