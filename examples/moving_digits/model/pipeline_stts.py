"""The `video-text-to-text` pipeline: questions about videos."""

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import BatchFeature, GenerationConfig
from transformers.pipelines.any_to_any import AnyToAnyPipeline, Chat, ReturnType
from transformers.pipelines.base import Pipeline
from transformers.video_utils import is_valid_video


# Parameters of `AnyToAnyPipeline` that are handed to it.
STOCK_PARAMETERS = (
    "max_new_tokens",
    "generate_kwargs",
    "return_full_text",
    "return_tensors",
    "return_type",
    "clean_up_tokenization_spaces",
    "stop_sequence",
    "continue_final_message",
    "skip_special_tokens",
)
BUDGET_PARAMETERS = ("frame_scale", "max_video_tokens")
SAMPLING_PARAMETERS = ("num_frames", "fps", "max_fps", "start", "end", "only_keyframes", *BUDGET_PARAMETERS)
PARAMETERS = (*STOCK_PARAMETERS, *SAMPLING_PARAMETERS, "prune_ratio", "processor_kwargs", "num_workers")
# Settings of `generate` that may be given without `generate_kwargs`.
GENERATION_PARAMETERS = frozenset(vars(GenerationConfig())) - {"max_new_tokens"}


class VideoQuestion(NamedTuple):
    """
    prompt (`str` or `Chat`): what the caller asked.
    video (*optional*): path or frames; a chat holds its videos itself.
    """

    prompt: str | Chat
    video: Any = None

    def to_messages(self) -> list[dict]:
        """The question as a chat."""
        if isinstance(self.prompt, Chat):
            return self.prompt.messages
        content = [] if self.video is None else [{"type": "video", "video": self.video}]
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.prompt}]}]


class VideoTextToTextPipeline(AnyToAnyPipeline):
    """
    Differences from `AnyToAnyPipeline`:
    - The first argument is the video. A video with plain text is put into the processor's chat template if it has one.
    - `batch_size` items of a list go through one call of the processor, padded on the left, and one of the model:
      samples that were processed one by one cannot be collated.
    - `prune_ratio`, the sampling of frames (`SAMPLING_PARAMETERS`) and generation settings such as `do_sample` can be
      given directly; names that nobody knows are refused.
    - Only new text is returned where the question is plain text; chats come back with the answer, as they do natively.
    - `save_pretrained` saves the processor too.

        >>> pipe = pipeline("video-text-to-text", model="org/name", trust_remote_code=True)
        >>> pipe("clip.mp4", text="What happens?", prune_ratio=0.8, max_new_tokens=20)
        [{'input_text': 'What happens?', 'generated_text': 'A man rides a bike.'}]
    """

    def check_model_type(self, supported_models: list[str] | dict) -> None:
        """Accepts every model: the stock list has only models that transformers itself ships."""

    def __call__(
        self, videos: Any = None, text: str | list | None = None, batch_size: int | None = None, **kwargs
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """
        Answers questions about videos.

        Args:
            videos:
                A video (`str` or `os.PathLike`: file, folder of images or address; `bytes` or a file that is open in
                binary mode; or frames as an array of shape `(num_frames, num_channels, height, width)` or
                `(num_frames, height, width, num_channels)` or as a list of images), a list of videos, or chats as for
                `text`.
            text (`str`, `list[str]`, `list[dict]` or `list[list[dict]]`, *optional*):
                The question for all videos or one for each; or, without `videos`, a chat or a list of chats.
            batch_size (`int`, *optional*): how many items of a list run at once; 1 if not given.
            max_new_tokens (`int`, *optional*): how many tokens to generate at most.
            generate_kwargs (`dict`, *optional*): arguments of the model's `generate`.
            prune_ratio (`float`, *optional*):
                Fraction of each video's windows to remove, `0 <= prune_ratio < 1`. The model's own if not given. More
                is removed where the next two need it.
            frame_scale (`int` or `float`, *optional*):
                So many times as many frames, at most all; of each video as many tokens remain as without it.
            max_video_tokens (`int`, *optional*):
                At most so many tokens of each video remain, its frames' time stamps and marks not counted. Where more
                than 80 % would have to be removed, fewer frames are sampled.
            num_frames (`int`, *optional*): how many frames to sample. The processor's own number if not given.
            fps (`int` or `float`, *optional*): how many frames a second to sample, instead of `num_frames`.
            max_fps (`int` or `float`, *optional*): at most so many frames a second, with `num_frames`.
            start (`int` or `float`, *optional*): frames are sampled from so many seconds after the first one.
            end (`int` or `float`, *optional*): frames are sampled before so many seconds after the first one.
            only_keyframes (`bool`, *optional*): whether only keyframes of files are sampled.
            processor_kwargs (`dict`, *optional*): other arguments of the processor.
            return_full_text (`bool`, *optional*):
                Whether `generated_text` begins with what was asked. By default it does for chats only.
            kwargs: settings of `GenerationConfig`, and arguments of `AnyToAnyPipeline` named in `STOCK_PARAMETERS`.

        Returns:
            `list[dict]`: with `input_text` and `generated_text`, one for each returned sequence; for a list of videos,
            questions or chats a list of such lists.

        Raises:
            TypeError: if an argument is not known.
            ValueError:
                if videos and texts do not fit together, a video cannot be read, or an argument is out of range.
        """
        _check_names(kwargs)
        questions, is_list = _make_questions(videos, text)
        size = next((size for size in (batch_size, self._batch_size) if size is not None), 1)
        if size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {size}.")
        answers = []
        for start in range(0, len(questions), size):
            # A tuple, because the stock code takes a list apart.
            answers += Pipeline.__call__(self, tuple(questions[start : start + size]), **kwargs)
        return answers if is_list else answers[0]

    def _sanitize_parameters(
        self, prune_ratio: float | None = None, processor_kwargs: dict | None = None, **kwargs
    ) -> tuple[dict, dict, dict]:
        stock = {name: kwargs[name] for name in STOCK_PARAMETERS if name in kwargs}
        # A copy, because the stock code writes into it.
        stock["generate_kwargs"] = dict(kwargs.get("generate_kwargs") or {})
        stock["generate_kwargs"].update({name: kwargs[name] for name in GENERATION_PARAMETERS & kwargs.keys()})
        preprocess, forward, postprocess = super()._sanitize_parameters(processor_kwargs=processor_kwargs, **stock)
        preprocess.update({name: kwargs[name] for name in SAMPLING_PARAMETERS if kwargs.get(name) is not None})
        if "fps" in preprocess:
            preprocess.setdefault("num_frames", None)
        elif "num_frames" in preprocess:
            preprocess.setdefault("fps", None)
        if not forward["generate_kwargs"]:
            # An empty one would replace what the pipeline was made with; likewise the default below.
            del forward["generate_kwargs"]
        if prune_ratio is not None:
            preprocess["prune_ratio"] = prune_ratio
        if all(kwargs.get(name) is None for name in ("return_full_text", "return_tensors", "return_type")):
            postprocess.pop("return_type", None)
        return preprocess, forward, postprocess

    def preprocess(
        self,
        inputs: tuple[VideoQuestion, ...],
        continue_final_message: bool | None = None,
        processor_kwargs: dict | None = None,
        prune_ratio: float | None = None,
        **sampling,
    ) -> BatchFeature:
        """
        Makes the model's inputs from one batch of questions.

        Args:
            inputs (`tuple[VideoQuestion]`): the questions.
            continue_final_message (`bool`, *optional*):
                Whether chats end in an answer to go on with. By default they do if the last message is the
                assistant's.
            processor_kwargs (`dict`, *optional*): arguments of the processor.
            prune_ratio (`float`, *optional*): for the model, or for the processor to go up from.
            sampling: those of `SAMPLING_PARAMETERS`.

        Returns:
            `BatchFeature`: what the processor returns for the batch, padded on the left, `prune_ratio` where it is not
            the model's, and `text`, the prompts.

        Raises:
            ValueError:
                if only some chats of the batch end in an answer to go on with, or the model does not count some
                frames, so that the processor cannot say how many tokens remain.
        """
        sampling = {name: value for name, value in sampling.items() if value is not None}
        processor_kwargs = {"padding": True, "padding_side": "left", **(processor_kwargs or {}), **sampling}
        given = processor_kwargs | (processor_kwargs.get("videos_kwargs") or {})
        if self._has_budget(given) and "prune_ratio" not in given:
            default = self.model.config.stts_config.prune_ratio
            processor_kwargs["prune_ratio"] = default if prune_ratio is None else prune_ratio
        if self.processor.chat_template is None and not isinstance(inputs[0].prompt, Chat):
            model_inputs = self._fill_prompts(inputs, processor_kwargs)
        else:
            model_inputs = self._fill_chats(inputs, continue_final_message, processor_kwargs)
        model_inputs = model_inputs.to(dtype=self.dtype)
        if prune_ratio is not None:
            model_inputs.setdefault("prune_ratio", prune_ratio)
        model_inputs["text"] = [question.prompt for question in inputs]
        return model_inputs

    def _has_budget(self, processor_kwargs: dict) -> bool:
        saved = {name: getattr(self.processor.video_processor, name) for name in BUDGET_PARAMETERS}
        asked = {name: value for name, value in (saved | processor_kwargs).items() if name in saved}
        if all(value is None for value in asked.values()):
            return False
        if self.model.config.stts_config.prune_from_frame > 0:
            raise ValueError(
                f"{asked} needs a model with `prune_from_frame`=0, whose tokens can be counted beforehand."
            )
        return True

    def _fill_prompts(self, questions: tuple[VideoQuestion, ...], processor_kwargs: dict) -> BatchFeature:
        videos = [question.video for question in questions if question.video is not None]
        placeholder = self.processor.video_token if videos else ""
        text = [placeholder + question.prompt for question in questions]
        return self.processor(text=text, videos=videos or None, return_tensors="pt", **processor_kwargs)

    def _fill_chats(
        self, questions: tuple[VideoQuestion, ...], continue_final_message: bool | None, processor_kwargs: dict
    ) -> BatchFeature:
        chats = [question.to_messages() for question in questions]
        if continue_final_message is None:
            ends = {chat[-1]["role"] == "assistant" for chat in chats}
            if len(ends) > 1:
                raise ValueError("In one batch either all chats or none may end in a message of the assistant.")
            continue_final_message = ends.pop()
        return self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=not continue_final_message,
            continue_final_message=continue_final_message,
            processor_kwargs=processor_kwargs,
        )

    def postprocess(self, model_outputs: dict, return_type: ReturnType | None = None, **kwargs) -> list[list[dict]]:
        """
        Decodes one batch of answers.

        Args:
            model_outputs (`dict`): what `_forward` returns.
            return_type (`ReturnType`, *optional*): by default the full chat for chats, else the new text.

        Returns:
            `list[list[dict]]`: for each question, its answers.
        """
        prompts, sequences = model_outputs["prompt_text"], model_outputs["generated_sequence"]
        if return_type is None:
            return_type = ReturnType.FULL_TEXT if isinstance(prompts[0], Chat) else ReturnType.NEW_TEXT
        sequences = sequences.flatten(0, -2)
        num_answers = len(sequences) // len(prompts)
        # One prompt an answer, because stock code before transformers 5.23 pairs them one to one.
        repeated = {
            "prompt_text": [prompt for prompt in prompts for _ in range(num_answers)],
            "input_ids": model_outputs["input_ids"].repeat_interleave(num_answers, dim=0),
            "generated_sequence": sequences,
        }
        records = super().postprocess(repeated, return_type=return_type, **kwargs)
        return [records[start : start + num_answers] for start in range(0, len(records), num_answers)]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Saves model, tokenizer and processor, so that `pipeline("video-text-to-text", save_directory)` loads them.

        Args:
            save_directory (`str` or `os.PathLike`): a folder; made if it does not exist.
            kwargs: as for `Pipeline.save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _check_names(arguments: dict) -> None:
    unknown = sorted(arguments.keys() - set(PARAMETERS) - GENERATION_PARAMETERS)
    if unknown:
        raise TypeError(
            f"Unknown arguments {unknown}: those of `generate` belong into `generate_kwargs`, those of the processor "
            f"into `processor_kwargs`; others are {', '.join(PARAMETERS)} and the settings of `GenerationConfig`."
        )


def _make_questions(videos: Any, text: Any) -> tuple[list[VideoQuestion], bool]:
    """The questions of a call, and whether it asked for a list of answers."""
    if _are_chats(videos):
        if text is not None:
            raise ValueError("Videos and texts of chats belong into their messages; got chats and `text`.")
        videos, text = None, videos
    if _are_chats(text):
        if videos is not None:
            raise ValueError("Videos of chats belong into their messages; got `videos` and chats.")
        is_list = not isinstance(text[0], dict)
        return [VideoQuestion(Chat(chat)) for chat in (text if is_list else [text])], is_list
    return _pair(videos, text)


def _are_chats(value: Any) -> bool:
    """Whether a value is a chat or a list of chats."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    first = value[0][0] if isinstance(value[0], (list, tuple)) and value[0] else value[0]
    return isinstance(first, dict) and "role" in first


def _pair(videos: Any, text: Any) -> tuple[list[VideoQuestion], bool]:
    videos_are_list, text_is_list = _is_video_list(videos), isinstance(text, (list, tuple))
    texts = list(text) if text_is_list else [text]
    if not texts or not all(isinstance(one, str) for one in texts):
        raise ValueError(f"`text` must be a string, a list of strings, or chats, got {text!r}.")
    if not videos_are_list:
        if videos is not None and len(texts) != 1:
            raise ValueError(f"Got 1 video and {len(texts)} texts; give one text or a list of videos as long.")
        return [VideoQuestion(one, videos) for one in texts], text_is_list
    if not text_is_list:
        texts = texts * len(videos)
    if len(videos) != len(texts) or not texts:
        raise ValueError(f"Got {len(videos)} videos and {len(texts)} texts; give one text or as many texts as videos.")
    return [VideoQuestion(one, video) for one, video in zip(texts, videos)], True


def _is_video_list(videos: Any) -> bool:
    """Whether this is several videos (also as one array with five dimensions), not one (also as a list of frames)."""
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        return videos.ndim == 5
    return isinstance(videos, (list, tuple)) and not is_valid_video(videos)


__all__ = ["VideoTextToTextPipeline"]
