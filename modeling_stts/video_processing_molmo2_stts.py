"""Video processor of Molmo2 with STTS: reads video files with PyAV."""

from typing import Any

import numpy as np
from transformers import BatchFeature, Molmo2VideoProcessor
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessorKwargs
from transformers.video_utils import VideoInput, VideoMetadata, make_batched_videos

from .stts_video import as_strings, read_video


class Molmo2SttsVideoProcessorKwargs(Molmo2VideoProcessorKwargs, total=False):
    """
    max_fps (`int` or `float`, *optional*): at most so many frames a second, with `num_frames`; natively whole only.
    start (`int` or `float`, *optional*): seconds after the first frame from which frames are sampled.
    end (`int` or `float`, *optional*): seconds after the first frame before which frames are sampled.
    only_keyframes (`bool`, *optional*): whether only a file's keyframes are sampled: encoders put some at scene cuts.
    """

    max_fps: int | float
    start: int | float | None
    end: int | float | None
    only_keyframes: bool


class Molmo2SttsVideoProcessor(Molmo2VideoProcessor):
    r"""
    Differences from `Molmo2VideoProcessor`:
    - Files (paths, bytes or open ones), folders of images and addresses of http(s), `hf://` and what else fsspec knows
      are decoded with PyAV; torchcodec is not needed. A folder's rate is taken to be `fps` or `max_fps`, as natively
      where it is not known.
    - `fps` of a call replaces the saved `num_frames` and the other way round; natively that is an error, so that `fps`
      can never be given in a call.
    - `sample_frames` never returns an index past the end; natively it does for some numbers, such as 7 frames of 17.
    - `start`, `end` and `only_keyframes` say which part of a video is sampled.
    - The sampling arguments are checked.

    `num_frames` frames (`int`, at most all) are sampled evenly, fewer where they would be more than `max_fps` a
    second; or `fps` frames a second. Of `start <= time < end` in seconds after the first frame where these are given,
    and among the keyframes where `only_keyframes` is set.

    Raises:
        ValueError:
            if `num_frames`, `fps` or `max_fps` is not positive, both `num_frames` and `fps` are given, `start` is
            negative or `end` is not after it.
    """

    _auto_class = "AutoVideoProcessor"
    valid_kwargs = Molmo2SttsVideoProcessorKwargs
    start = None
    end = None
    only_keyframes = False

    @classmethod
    def from_dict(cls, video_processor_dict: dict[str, Any], **kwargs):
        return super().from_dict(video_processor_dict, **_replace_saved_sampling(kwargs))

    def __init__(self, **kwargs):
        super().__init__(**_replace_saved_sampling(kwargs))
        _check_sampling(num_frames=self.num_frames, fps=self.fps, max_fps=self.max_fps)
        _check_part(self.start, self.end)

    def preprocess(self, videos: VideoInput, **kwargs) -> BatchFeature:
        """
        Samples, resizes and normalizes videos and cuts their frames into patches.

        Args:
            videos:
                One video or a list: paths, addresses, bytes or open files as for `read_video`; or frames as arrays of
                shape `(num_frames, num_channels, height, width)` or `(num_frames, height, width, num_channels)` or as
                lists of images.
            kwargs: as for `Molmo2VideoProcessor`, which replace the saved settings for this call.

        Returns:
            `BatchFeature`: with `pixel_values_videos` of shape `(total_frames, num_patches, patch_size**2 * 3)`,
            `video_token_pooling` of shape `(total_windows, pooling_height * pooling_width)` (patch indices over all
            videos, -1 = none) and `video_grids` of shape `(num_videos, 3)` (frames, rows and columns of windows).

        Raises:
            ValueError:
                if a file is not a video that can be decoded, the sampling arguments contradict each other, are not
                positive or leave no frame, paths and arrays are mixed, or keyframes of arrays are asked for.
        """
        videos = make_batched_videos(as_strings(videos))
        if len({isinstance(video, str) for video in videos}) > 1:
            raise ValueError("Videos of one call must be all paths or all frames, got both.")
        if kwargs.get("only_keyframes", self.only_keyframes) and not isinstance(videos[0], str):
            raise ValueError("`only_keyframes` needs a file: frames that are given as arrays have no keyframes.")
        return super().preprocess(videos, **_replace_saved_sampling(kwargs))

    def fetch_videos(self, video_url_or_urls: str | list, sample_indices_fn=None) -> tuple[Any, Any]:
        """
        Reads one file or a list of files.

        Args:
            video_url_or_urls (`str` or `list[str]`): paths, addresses or what `as_string` makes of a file.
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
        *,
        start: int | float | None = None,
        end: int | float | None = None,
        only_keyframes: bool = False,
        **kwargs,
    ) -> np.ndarray:
        """
        Chooses evenly spaced frames of one video or of a part of it, the first one included.

        Args:
            metadata (`VideoMetadata`): at least `total_num_frames`; `fps` in frames per second where known.
            num_frames (`int`, *optional*): how many; all frames if there are fewer. The saved number if not given.
            fps (`int` or `float`, *optional*): how many a second, instead of `num_frames`.
            max_fps (`int` or `float`, *optional*): at most so many a second, with `num_frames`.
            start (`int` or `float`, *optional*): not before so many seconds after the first frame.
            end (`int` or `float`, *optional*): before so many seconds after the first frame.
            only_keyframes (`bool`, *optional*): only keyframes; then `metadata` must be a file's.

        Returns:
            `np.ndarray` of shape `(num_sampled,)`, int32: ascending frame indices, at least one.

        Raises:
            ValueError:
                if the video has no frames or none in that part, its rate is not known but a part is asked for, or an
                argument contradicts another or is not positive.
        """
        _check_sampling(num_frames=num_frames, fps=fps, max_fps=max_fps)
        _check_part(start, end)
        if metadata.total_num_frames < 1:
            raise ValueError(f"A video must have at least one frame, got {metadata.total_num_frames}.")
        rates = {"num_frames": num_frames, "fps": fps, "max_fps": max_fps, **kwargs}
        if start is None and end is None and not only_keyframes:
            return self._sample_evenly(metadata, **rates)
        if metadata.fps is None:
            raise ValueError("A part of a video can only be sampled if its `fps` is known.")
        part = _part(metadata, start, end, only_keyframes)
        length = metadata.duration or metadata.total_num_frames / metadata.fps
        # Rounded, or 2.3 - 1.3 seconds at two frames a second would be one frame.
        duration = round(min(length, length if end is None else end) - (start or 0), 6)
        return part[self._sample_evenly(VideoMetadata(len(part), metadata.fps, duration=duration), **rates)]

    def _sample_evenly(self, metadata: VideoMetadata, **rates) -> np.ndarray:
        indices = super().sample_frames(metadata, **rates)
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


def _part(metadata: VideoMetadata, start: float | None, end: float | None, only_keyframes: bool) -> np.ndarray:
    """Ascending indices of the frames, or keyframes, that are presented in `start <= seconds < end`."""
    metadata.frames_indices = range(metadata.total_num_frames)
    times = np.array(metadata.timestamps)
    begin = 0 if start is None else start
    part = np.flatnonzero((times >= begin) & (times < (np.inf if end is None else end)))
    if only_keyframes:
        part = np.intersect1d(part, metadata.keyframes)
    if len(part) == 0:
        kind = "keyframe" if only_keyframes else "frame"
        asked = f"`start`={begin}" if end is None else f"`start`={begin} and before `end`={end}"
        raise ValueError(f"No {kind} is at or after {asked} seconds; the last frame is at {times[-1]:.3f}.")
    return part.astype(np.int32)


def _check_part(start: float | None, end: float | None) -> None:
    if start is not None and not 0 <= start < np.inf:
        raise ValueError(f"`start` must be a number of seconds that is not negative, got {start}.")
    if end is not None and not (start or 0) < end < np.inf:
        raise ValueError(f"`end` must be a number of seconds after `start`, got start={start} and end={end}.")


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
