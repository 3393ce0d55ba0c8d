"""The pipeline "video-text-to-text": videos and questions, or chats, to answers."""

import os
from typing import Any

from transformers import GenerationConfig
from transformers.pipelines.any_to_any import AnyToAnyPipeline, Chat, ReturnType
from transformers.video_utils import is_valid_video


class ChatBatch:
    """
    Chats that go through processor and model together. (A list would be taken apart by the base class, whose collation
    cannot join videos.)

    chats (`list[Chat]`): at least one.
    """

    def __init__(self, chats: list[Chat]):
        self.chats = chats


class VideoTextToTextPipeline(AnyToAnyPipeline):
    """
    Answers questions about videos.

    ```python
    >>> pipe = pipeline("video-text-to-text", model="org/name", trust_remote_code=True)
    >>> pipe("clip.mp4", text="What happens?", prune_ratio=0.8, max_new_tokens=32)
    [{"input_text": [...], "generated_text": "..."}]
    ```

    Differences from `AnyToAnyPipeline`:
    - a video comes first, with its question as `text`; both become a chat;
    - `batch_size` chats go through one call of the processor, padded on the left;
    - `prune_ratio` and generation settings (`do_sample=False`) are passed on to `generate`, and `num_frames`, `fps`
      and `max_fps` to the processor;
    - only the new text is returned, unless `return_full_text=True`;
    - `save_pretrained` saves the processor too.
    """

    def check_model_type(self, supported_models) -> None:
        """Models with STTS are not in transformers' own list, and their configuration names this pipeline."""

    def __call__(self, videos=None, text=None, batch_size: int | None = None, **kwargs) -> list:
        """
        Args:
            videos (`str`, `Path`, array, list of frames, or `list` of these): one video or several; or chats.
            text (`str`, `list[str]` or chats):
                The question about each video. Chats are lists of messages with "role" and "content"; a list of chats
                is a batch.
            batch_size (`int`, *optional*, defaults to the pipeline's, which is 1): chats that run together.
            prune_ratio (`float`, *optional*): fraction of each video's windows to remove.
            num_frames (`int`), fps (`float`), max_fps (`int`), *optional*: how frames are sampled.
            generate_kwargs (`dict`, *optional*), or its items as arguments: settings of `generate`.
            return_full_text (`bool`, *optional*, defaults to `False`): whether to return the whole chat.

        Returns:
            `list[dict]` with "input_text" and "generated_text" for one video or chat; a list of these for several.

        Raises:
            ValueError: if there is no text, or not as many texts as videos.
        """
        chats, is_single = _as_chats(videos, text)
        batch_size = self._batch_size if batch_size is None else batch_size
        batch_size = 1 if batch_size is None else batch_size
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        answers = []
        for start in range(0, len(chats), batch_size):
            batch = chats[start : start + batch_size]
            # Past the stock `__call__`, which takes other arguments, to what it ends in.
            records = super(AnyToAnyPipeline, self).__call__(ChatBatch(batch), **kwargs)
            per_chat = len(records) // len(batch)
            answers += [records[i : i + per_chat] for i in range(0, len(records), per_chat)]
        return answers[0] if is_single else answers

    def _sanitize_parameters(self, prune_ratio=None, generate_kwargs=None, processor_kwargs=None, **kwargs):
        generation_names = vars(GenerationConfig()).keys() - {"max_new_tokens"}
        generate_kwargs = dict(generate_kwargs or {})
        generate_kwargs |= {name: kwargs.pop(name) for name in generation_names & kwargs.keys()}
        if prune_ratio is not None:
            generate_kwargs["prune_ratio"] = prune_ratio
        processor_kwargs = dict(processor_kwargs or {})
        processor_kwargs |= {name: kwargs.pop(name) for name in ("num_frames", "fps", "max_fps") if name in kwargs}
        if not kwargs.keys() & {"return_full_text", "return_type", "return_tensors"}:
            kwargs["return_type"] = ReturnType.NEW_TEXT
        return super()._sanitize_parameters(
            generate_kwargs=generate_kwargs, processor_kwargs=processor_kwargs or None, **kwargs
        )

    def preprocess(self, inputs: ChatBatch, continue_final_message=None, processor_kwargs=None, **template_kwargs):
        last_roles = [chat.messages[-1]["role"] for chat in inputs.chats]
        if continue_final_message is None:
            continue_final_message = all(role == "assistant" for role in last_roles)
        model_inputs = self.processor.apply_chat_template(
            [chat.messages for chat in inputs.chats],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=not continue_final_message,
            continue_final_message=continue_final_message,
            processor_kwargs={"padding": True, "padding_side": "left", **(processor_kwargs or {})},
            **template_kwargs,
        ).to(dtype=self.dtype)
        model_inputs["text"] = inputs.chats
        return model_inputs

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Saves the model, its code, the processor and the tokenizer: a complete hub folder.

        Args:
            save_directory (`str` or `os.PathLike`): the folder; made where it does not exist.
            kwargs: see `PreTrainedModel.save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], dict)


def _as_chats(videos: Any, text: Any) -> tuple[list[Chat], bool]:
    """The chats to answer, and whether the caller gave one by itself."""
    given = text if videos is None else videos
    if _is_chat(given):
        return [Chat(given)], True
    if isinstance(given, (list, tuple)) and len(given) > 0 and all(map(_is_chat, given)):
        return [Chat(chat) for chat in given], False
    if videos is None:
        raise ValueError("Give a video and its question as `text`, or chats.")
    is_single = isinstance(videos, (str, os.PathLike)) or is_valid_video(videos)
    videos = [videos] if is_single else list(videos)
    texts = [text] * len(videos) if isinstance(text, str) else list(text or [])
    if len(texts) != len(videos):
        raise ValueError(f"Give one `text` for all videos or one for each: got {len(texts)} for {len(videos)} videos.")
    return [_question(video, question) for video, question in zip(videos, texts)], is_single


def _question(video: Any, question: str) -> Chat:
    content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    return Chat([{"role": "user", "content": content}])


__all__ = ["VideoTextToTextPipeline"]
