"""Video processor of Molmo2 with STTS: reads video files with PyAV."""

from typing import Any

import numpy as np
from transformers import BatchFeature, Molmo2VideoProcessor
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessorKwargs
from transformers.video_utils import VideoInput, VideoMetadata, make_batched_videos

from .stts_video import paths_as_strings, read_video


class Molmo2SttsVideoProcessorKwargs(Molmo2VideoProcessorKwargs, total=False):
    """
    max_fps (`int` or `float`, *optional*): at most so many frames a second, with `num_frames`; natively whole only.
    """

    max_fps: int | float


class Molmo2SttsVideoProcessor(Molmo2VideoProcessor):
    r"""
    Differences from `Molmo2VideoProcessor`:
    - Files (`str` or `os.PathLike`) and http(s) addresses are decoded with PyAV; torchcodec is not needed.
    - `fps` of a call replaces the saved `num_frames` and the other way round; natively that is an error, so that `fps`
      can never be given in a call.
    - `sample_frames` never returns an index past the end; natively it does for some numbers, such as 7 frames of 17.
    - `num_frames`, `fps` and `max_fps` are checked.

    `num_frames` frames (`int`, at most all) are sampled evenly, fewer where they would be more than `max_fps` a
    second; or `fps` frames a second.

    Raises:
        ValueError: if `num_frames`, `fps` or `max_fps` is not positive, or both `num_frames` and `fps` are given.
    """

    _auto_class = "AutoVideoProcessor"
    valid_kwargs = Molmo2SttsVideoProcessorKwargs

    @classmethod
    def from_dict(cls, video_processor_dict: dict[str, Any], **kwargs):
        return super().from_dict(video_processor_dict, **_replace_saved_sampling(kwargs))

    def __init__(self, **kwargs):
        super().__init__(**_replace_saved_sampling(kwargs))
        _check_sampling(num_frames=self.num_frames, fps=self.fps, max_fps=self.max_fps)

    def preprocess(self, videos: VideoInput, **kwargs) -> BatchFeature:
        """
        Samples, resizes and normalizes videos and cuts their frames into patches.

        Args:
            videos:
                One video or a list: paths or http(s) addresses, or frames as arrays of shape
                `(num_frames, num_channels, height, width)` or `(num_frames, height, width, num_channels)` or as lists
                of images.
            kwargs: as for `Molmo2VideoProcessor`, which replace the saved settings for this call.

        Returns:
            `BatchFeature`: with `pixel_values_videos` of shape `(total_frames, num_patches, patch_size**2 * 3)`,
            `video_token_pooling` of shape `(total_windows, pooling_height * pooling_width)` (patch indices over all
            videos, -1 = none) and `video_grids` of shape `(num_videos, 3)` (frames, rows and columns of windows).

        Raises:
            ValueError:
                if a file is not a video that can be decoded, the sampling arguments contradict each other or are not
                positive, or paths and arrays are mixed.
        """
        videos = make_batched_videos(paths_as_strings(videos))
        if len({isinstance(video, str) for video in videos}) > 1:
            raise ValueError("Videos of one call must be all paths or all frames, got both.")
        return super().preprocess(videos, **_replace_saved_sampling(kwargs))

    def fetch_videos(self, video_url_or_urls: str | list, sample_indices_fn=None) -> tuple[Any, Any]:
        """
        Reads one file or a list of files.

        Args:
            video_url_or_urls (`str` or `list[str]`): paths or http(s) addresses.
            sample_indices_fn (`Callable`, *optional*): as in `read_video`; all frames if not given.

        Returns:
            `tuple`: frames, `np.ndarray` of shape `(num_frames, height, width, 3)`, uint8, and `VideoMetadata`; for a
            list, a tuple of each.

        Raises:
            ValueError: if a file is not a video that can be decoded.
        """
        if isinstance(video_url_or_urls, list):
            return tuple(zip(*[self.fetch_videos(video, sample_indices_fn) for video in video_url_or_urls]))
        return read_video(video_url_or_urls, sample_indices_fn)

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: int | float | None = None,
        max_fps: int | float | None = None,
        **kwargs,
    ) -> np.ndarray:
        """
        Chooses evenly spaced frames of one video, the first one included.

        Args:
            metadata (`VideoMetadata`): at least `total_num_frames`; `fps` in frames per second where known.
            num_frames (`int`, *optional*): how many; all frames if there are fewer. The saved number if not given.
            fps (`int` or `float`, *optional*): how many a second, instead of `num_frames`.
            max_fps (`int` or `float`, *optional*): at most so many a second, with `num_frames`.

        Returns:
            `np.ndarray` of shape `(num_sampled,)`, int32: ascending frame indices, at least one.

        Raises:
            ValueError: if the video has no frames, or an argument contradicts another or is not positive.
        """
        _check_sampling(num_frames=num_frames, fps=fps, max_fps=max_fps)
        if metadata.total_num_frames < 1:
            raise ValueError(f"A video must have at least one frame, got {metadata.total_num_frames}.")
        indices = super().sample_frames(metadata, num_frames=num_frames, fps=fps, max_fps=max_fps, **kwargs)
        # Rounding in the native code can add one index too many, which is always the number of frames itself.
        indices = indices[indices < metadata.total_num_frames]
        # A tensor with one index would take a single frame out of a NumPy array, without the dimension of frames.
        return indices.numpy()


def _replace_saved_sampling(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments in which a given `fps` switches a saved or default `num_frames` off, and the other way round."""
    if kwargs.get("fps") is not None:
        return {"num_frames": None, **kwargs}
    if kwargs.get("num_frames") is not None:
        return {"fps": None, **kwargs}
    return kwargs


def _check_sampling(**arguments: float | None) -> None:
    for name, value in arguments.items():
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"`{name}` must be a positive number, got {value}.")
    if arguments["num_frames"] is not None and arguments["fps"] is not None:
        raise ValueError(
            f"Only one of `num_frames` and `fps` may be given, got num_frames={arguments['num_frames']} and "
            f"fps={arguments['fps']}."
        )


__all__ = ["Molmo2SttsVideoProcessor"]
