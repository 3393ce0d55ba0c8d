"""Video processor of Molmo2 with STTS: decodes files with PyAV, and samples by what the call says."""

import torch
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor
from transformers.video_utils import VideoMetadata

from .stts_video import paths_as_strings, read_video


class Molmo2SttsVideoProcessor(Molmo2VideoProcessor):
    """
    Differences from `Molmo2VideoProcessor`:
    - files are decoded with PyAV (the stock loader needs torchcodec), and may be given as `pathlib.Path`;
    - `fps` in a call overrules a saved `num_frames`, and `num_frames` a saved `fps`; of two saved ones `fps` counts;
    - frame counts and rates that are not above 0 are refused.
    """

    _auto_class = "AutoVideoProcessor"

    def preprocess(self, videos, **kwargs):
        """
        As the native processor.

        Args:
            videos: a path, a list of frames, an array of shape `(num_frames, height, width, 3)` or
                `(num_frames, 3, height, width)`, or a list of these.
            num_frames (`int`, *optional*): at most so many frames, spread evenly; a shorter video gives all it has.
            fps (`float`, *optional*): frames for each second of video.
            max_fps (`int`, *optional*): no more frames for each second than this, where `num_frames` counts.

        Raises:
            FileNotFoundError: if a path does not exist.
            ValueError: if a file is no readable video, or a number is not above 0.
        """
        if kwargs.get("num_frames") is not None:
            kwargs.setdefault("fps", None)
        elif kwargs.get("fps") is not None or self.fps is not None:
            kwargs.setdefault("num_frames", None)
        return super().preprocess(paths_as_strings(videos), **kwargs)

    def fetch_videos(self, video_url_or_urls: str | list, sample_indices_fn=None):
        """
        Decodes one file, or each of a list, in which case frames and metadata come as two lists.

        Args:
            video_url_or_urls (`str` or `list`): path or URL.
            sample_indices_fn (`Callable`, *optional*): see `read_video`; all frames are kept without it.
        """
        if isinstance(video_url_or_urls, (list, tuple)):
            return tuple(zip(*(self.fetch_videos(url, sample_indices_fn) for url in video_url_or_urls)))
        return read_video(video_url_or_urls, sample_indices_fn or _all_frames)

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        max_fps: float | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Indices of the frames to keep, spread evenly from the first frame on.

        Args:
            metadata (`VideoMetadata`): of the whole video.
            num_frames (`int`, *optional*), fps (`float`, *optional*), max_fps (`float`, *optional*): see `preprocess`.

        Returns:
            `torch.Tensor` of shape `(num_sampled,)`, int32, rising.

        Raises:
            ValueError: if a number is not above 0, or both `num_frames` and `fps` are given.
        """
        for name, value in (("num_frames", num_frames), ("fps", fps), ("max_fps", max_fps)):
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")
        return super().sample_frames(metadata, num_frames=num_frames, fps=fps, max_fps=max_fps, **kwargs)


def _all_frames(metadata: VideoMetadata) -> range:
    return range(metadata.total_num_frames)


__all__ = ["Molmo2SttsVideoProcessor"]
