"""Video processor of Molmo2 with STTS: reads video files with PyAV."""

import math
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, Molmo2VideoProcessor
from transformers.image_utils import ChannelDimension
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessorKwargs
from transformers.video_utils import VideoInput, VideoMetadata, infer_channel_dimension_format, make_batched_videos

from .stts_budget import TokenBudget, make_budget
from .stts_video import as_strings, read_video


# More at once is hardly faster, and frames of full size in float32 are what takes most memory.
FRAMES_AT_ONCE = 8


class Molmo2SttsVideoProcessorKwargs(Molmo2VideoProcessorKwargs, total=False):
    """
    max_fps (`int` or `float`, *optional*): at most so many frames a second, with `num_frames`; natively whole only.
    start (`int` or `float`, *optional*): seconds after the first frame from which frames are sampled.
    end (`int` or `float`, *optional*): seconds after the first frame before which frames are sampled.
    only_keyframes (`bool`, *optional*): whether only a file's keyframes are sampled: encoders put some at scene cuts.
    frame_scale (`int` or `float`, *optional*): so many times as many frames, of which as many tokens remain.
    max_video_tokens (`int`, *optional*): so many video tokens at most remain of each video.
    prune_ratio (`float`, *optional*): the model's, from which the two before go up.
    """

    max_fps: int | float
    start: int | float | None
    end: int | float | None
    only_keyframes: bool
    frame_scale: int | float | None
    max_video_tokens: int | None
    prune_ratio: int | float | None


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
    - `frame_scale` and `max_video_tokens` choose frames, and a ratio to prune them with, by the tokens that remain.
    - The sampling arguments are checked.
    - Frames are resized and cut into patches a few at a time, with the same numbers, so that there is never a copy of
      the whole video, which natively there is in uint8 and in float32.

    `num_frames` frames (`int`, at most all) are sampled evenly, fewer where they would be more than `max_fps` a
    second; or `fps` frames a second. Of `start <= time < end` in seconds after the first frame where these are given,
    and among the keyframes where `only_keyframes` is set.

    With `frame_scale`, so many times as many frames are sampled, at most all, and so much more is pruned that exactly
    as many tokens remain of a video as without it. With `max_video_tokens`, so much more is pruned that at most so
    many tokens remain of each video; where that would be more than 80 % (and more than `prune_ratio`), fewer frames
    are sampled. What is counted are the tokens that stand for windows, not those of time stamps and around frames. For
    both, a model must have `prune_from_frame=0`, as it has by default.

    Raises:
        ValueError:
            if `num_frames`, `fps` or `max_fps` is not positive, both `num_frames` and `fps` are given, `start` is
            negative or `end` is not after it, `frame_scale` is below 1 or given without `prune_ratio`, or
            `max_video_tokens` is less than one frame has.
    """

    _auto_class = "AutoVideoProcessor"
    valid_kwargs = Molmo2SttsVideoProcessorKwargs
    start = None
    end = None
    only_keyframes = False
    frame_scale = None
    max_video_tokens = None
    prune_ratio = None

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
            With `frame_scale` or `max_video_tokens` also `prune_ratio` (`list[float]`, one for each video), which the
            model takes.

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
        kwargs = _replace_saved_sampling(kwargs)
        settings = {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__} | kwargs
        budget = self._budget(**settings)
        if budget is None:
            if kwargs.get("prune_ratio") is not None:
                raise ValueError(
                    f"`prune_ratio`={kwargs['prune_ratio']} is for the model: pass it to `generate` or the pipeline. "
                    "The processor needs it only with `frame_scale` or `max_video_tokens`."
                )
            return super().preprocess(videos, **kwargs)
        if settings["frame_scale"] is not None and not settings["do_sample_frames"]:
            raise ValueError("`frame_scale` samples more frames, which needs `do_sample_frames=True`.")
        out = super().preprocess(videos, **{**kwargs, "return_metadata": True})
        metadata = out["video_metadata"] if settings["return_metadata"] else out.pop("video_metadata")
        if settings["do_sample_frames"]:
            out["prune_ratio"] = [video.prune_ratio for video in metadata]
        else:
            out["prune_ratio"] = [budget.raise_ratio(int(frames), int(frames)) for frames, _, _ in out["video_grids"]]
        return out

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

    def _prepare_input_videos(
        self,
        videos: list[np.ndarray | torch.Tensor],
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
    ) -> list[torch.Tensor]:
        """Views of the videos with channels first, on the device if one is given."""
        prepared = []
        for video in map(torch.as_tensor, videos):
            if (input_data_format or infer_channel_dimension_format(video)) == ChannelDimension.LAST:
                video = video.permute(0, 3, 1, 2)
            if do_convert_rgb:
                video = self.convert_to_rgb(video)
            prepared.append(video if device is None else video.to(device))
        return prepared

    def _preprocess(self, videos: list[torch.Tensor], return_tensors: str | None = None, **kwargs) -> BatchFeature:
        pixel_values, pooling, grids, first_frame = None, [], [], 0
        for video in videos:
            for frames in video.split(FRAMES_AT_ONCE):
                part = super()._preprocess([frames.contiguous()], **kwargs)
                patches = part["pixel_values_videos"]
                if pixel_values is None:
                    pixel_values = patches.new_empty((sum(map(len, videos)), *patches.shape[1:]))
                pixel_values[first_frame : first_frame + len(frames)] = patches
                indices = part["video_token_pooling"]
                pooling.append(torch.where(indices < 0, indices, indices + first_frame * patches.shape[1]))
                first_frame += len(frames)
            grids.append([len(video), *part["video_grids"][0, 1:].tolist()])
        data = {
            "pixel_values_videos": pixel_values,
            "video_token_pooling": torch.cat(pooling),
            "video_grids": torch.tensor(grids),
        }
        return BatchFeature(data, tensor_type=return_tensors)

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
            kwargs: `frame_scale`, `max_video_tokens` and `prune_ratio`, and others, which do not matter. With one of
                the first two, `metadata.prune_ratio` becomes the ratio to prune these frames with.

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
        part, part_metadata = None, metadata
        if start is not None or end is not None or only_keyframes:
            part, part_metadata = _part(metadata, start, end, only_keyframes)
        budget, indices = self._budget(**kwargs), self._sample_evenly(part_metadata, num_frames, fps, max_fps)
        if budget is not None:
            num_frames = len(indices)
            indices = self._sample_evenly(part_metadata, budget.scale_frames(num_frames), None, math.inf)
            metadata.prune_ratio = budget.raise_ratio(num_frames, len(indices))
        return indices if part is None else part[indices]

    def _budget(
        self,
        frame_scale: int | float | None = None,
        max_video_tokens: int | None = None,
        prune_ratio: float | None = None,
        **kwargs,
    ) -> TokenBudget | None:
        size, patch_size, pooling_size = (
            kwargs.get(name, getattr(self, name)) for name in ("size", "patch_size", "pooling_size")
        )
        size = self._standardize_kwargs(size=size, default_to_square=True)["size"]
        num_windows = math.prod(math.ceil(size.height // patch_size / pool) for pool in pooling_size)
        return make_budget(num_windows, frame_scale, max_video_tokens, prune_ratio)

    def _sample_evenly(
        self, metadata: VideoMetadata, num_frames: int | None, fps: float | None, max_fps: float | None
    ) -> np.ndarray:
        indices = super().sample_frames(metadata, num_frames, fps, max_fps)
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


def _part(
    metadata: VideoMetadata, start: float | None, end: float | None, only_keyframes: bool
) -> tuple[np.ndarray, VideoMetadata]:
    """
    Ascending indices of the frames, or keyframes, that are presented in `start <= seconds < end`, and the metadata of
    a video that has only these.
    """
    if metadata.fps is None:
        raise ValueError("A part of a video can only be sampled if its `fps` is known.")
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
    length = metadata.duration or metadata.total_num_frames / metadata.fps
    # Rounded, or 2.3 - 1.3 seconds at two frames a second would be one frame.
    duration = round(min(length, length if end is None else end) - begin, 6)
    return part.astype(np.int32), VideoMetadata(len(part), metadata.fps, duration=duration)


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
