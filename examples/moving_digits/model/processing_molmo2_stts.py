"""Processor of Molmo2 with STTS."""

from typing import TYPE_CHECKING, Any

from transformers import BatchFeature, Molmo2Processor
from transformers.image_utils import ImageInput
from transformers.video_utils import VideoInput, is_valid_video, make_batched_videos

from .stts_video import as_strings


if TYPE_CHECKING:
    # `save_pretrained` copies the files that this one imports.
    from .video_processing_molmo2_stts import Molmo2SttsVideoProcessor  # noqa: F401


class Molmo2SttsProcessor(Molmo2Processor):
    r"""
    Differences from `Molmo2Processor`:
    - Batches are padded, and on the left, as generation needs it, whatever the tokenizer's setting; a call's `padding`
      and `padding_side` replace that.
    - Videos may be path objects, bytes and open files.
    - Each frame's time in the prompt is when the file presents it, in seconds after the first frame; natively it is
      the frame's number divided by the average rate.
    - `frame_scale` and `max_video_tokens` add `prune_ratio` (`list[float]`, one for each video) to what is returned.
    - Lists of videos for each prompt are compared with that prompt's placeholders; natively only the sums are, and
      those not before transformers 5.23.
    """

    _auto_class = "AutoProcessor"
    # Tensors of ratios would lose digits where inputs are cast to the model's dtype.
    skip_tensor_conversion = [*Molmo2Processor.skip_tensor_conversion, "prune_ratio"]

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
                Empty lists are as none.
            kwargs: as for `Molmo2Processor` and `Molmo2SttsVideoProcessor`, such as `num_frames` and `start`.

        Returns:
            `BatchFeature`: with `input_ids`, `attention_mask` and `mm_token_type_ids` of shape
            `(batch_size, sequence_length)`, and what the image and video processors return.

        Raises:
            ValueError:
                if prompts and videos do not fit together, a prompt has several videos, there are images beside videos,
                or a video cannot be read.
        """
        if images is not None and videos is not None:
            # Before anything is decoded: the model would refuse them.
            raise ValueError(
                "Molmo2 takes images or videos in one call, not both, whatever prompts they are in. Ask in separate "
                "calls, or put the image among the frames of the video."
            )
        videos = as_strings(videos)
        if isinstance(videos, list) and all(isinstance(row, list) and not row for row in videos):
            # The native code would look for a first video.
            videos = None
        if text is not None:
            self._check_video_counts([text] if isinstance(text, str) else text, videos)
        padding = {"padding": True, "padding_side": "left"}
        text_kwargs = {name: value for name, value in padding.items() if name not in kwargs}
        text_kwargs.update(kwargs.pop("text_kwargs", {}))
        return super().__call__(images=images, text=text, videos=videos, text_kwargs=text_kwargs, **kwargs)

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        """
        Makes the text that stands for one video.

        Args:
            video_inputs (`dict`): what the video processor returned, with `video_grids` and `video_metadata`.
            video_idx (`int`): which of its videos.

        Returns:
            `str`: each frame's time and tokens.
        """
        metadata = video_inputs["video_metadata"][video_idx]
        if metadata.fps is None or metadata.frames_indices is None:
            return super().replace_video_token(video_inputs, video_idx, **kwargs)
        return self.get_video_string(video_inputs["video_grids"][video_idx], metadata.timestamps)

    def _check_video_counts(self, text: list[str], videos: Any) -> None:
        num_placeholders = [prompt.count(self.video_token) for prompt in text]
        for row, expected in enumerate(num_placeholders):
            if expected > 1:
                raise ValueError(
                    f"Prompt {row} has {expected} {self.video_token} placeholders. At most one video is supported per "
                    "sample; give the others in prompts of their own."
                )
        if isinstance(videos, list) and len(videos) == len(text) and all(map(_is_list_of_videos, videos)):
            for row, (expected, row_videos) in enumerate(zip(num_placeholders, videos)):
                given = len(make_batched_videos(row_videos)) if row_videos else 0
                if expected != given:
                    message = f"Prompt {row} has {expected} {self.video_token} placeholders, but {given} videos."
                    raise ValueError(message)
        expected, given = sum(num_placeholders), 0 if videos is None else len(make_batched_videos(videos))
        if expected != given:
            raise ValueError(f"The prompts have {expected} {self.video_token} placeholders, but {given} videos.")


def _is_list_of_videos(value: Any) -> bool:
    return isinstance(value, list) and not is_valid_video(value)


__all__ = ["Molmo2SttsProcessor"]
