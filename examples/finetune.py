"""Fine-tunes Molmo2 with STTS on your own videos, on one device or, by `accelerate launch`, on many.

    python examples/finetune.py --model allenai/Molmo2-4B --data train.jsonl --output_dir out
    python examples/finetune.py --model my_model --data train.jsonl --eval_data test.jsonl --output_dir out
    accelerate launch --config_file examples/finetuning/fsdp2.yaml examples/finetune.py --model ...

The model is a folder or a repository of the Hub with a Molmo2 checkpoint, which gets a new scorer, or an STTS one. The
data is a JSONL file of conversations (see `finetuning/samples.py`). All options of transformers' `TrainingArguments`
are options here too. OUT/final holds the trained model, or the adapters of LoRA. A training that was interrupted goes
on from the last whole checkpoint when the same command is given again.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from finetuning.collator import Collator
from finetuning.encoding import ON_BAD_VIDEO, ConversationDataset, Encoder
from finetuning.groups import GROUPS, add_lora, freeze
from finetuning.samples import read_samples
from finetuning.trainer import FinetuningArguments, FinetuningTrainer, last_good_checkpoint
from huggingface_hub import snapshot_download
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging

from hub_upload.build import DTYPES, load_config, load_model, load_processor
from modeling_stts import Molmo2SttsConfig, Molmo2SttsForConditionalGeneration, Molmo2SttsProcessor


logger = logging.get_logger(__name__)


@dataclass
class Options:
    """What is trained, and on what."""

    model: str = field(metadata={"help": "Folder or Hub repository of a Molmo2 or STTS checkpoint."})
    data: str = field(metadata={"help": "JSONL file with the conversations to learn from."})
    eval_data: str | None = field(default=None, metadata={"help": "JSONL file to measure accuracy on."})
    num_frames: int | None = field(
        default=None, metadata={"help": "Frames of a video, at most; what the model's processor says if not given."}
    )
    on_bad_video: str = field(
        default=ON_BAD_VIDEO[0],
        metadata={"help": "What to do about a video that cannot be decoded.", "choices": ON_BAD_VIDEO},
    )
    pack: bool = field(default=False, metadata={"help": "Let short samples of a batch share a row."})
    prune_ratio: float | None = field(
        default=None, metadata={"help": "Fraction of a video's tokens to remove; the checkpoint's if not given."}
    )
    stts_config: str = field(default="{}", metadata={"help": "Other fields of SttsConfig to change, as JSON."})
    freeze: list[str] = field(
        default_factory=list, metadata={"help": f"Parts that are not trained, of {', '.join(GROUPS)}."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Of the weights. Half precision rounds small steps away, but not with LoRA.",
            "choices": DTYPES,
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "Train LoRA adapters of this rank and the scorer; 0 = all."})
    lora_alpha: float = field(default=32.0, metadata={"help": "Scale of the adapters, times their rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapters."})

    def changed_fields(self) -> dict:
        """
        Fields of `SttsConfig` to change.

        Raises:
            ValueError: if `stts_config` is not a JSON object or holds what has an option of its own.
        """
        try:
            fields = json.loads(self.stts_config)
        except ValueError as error:
            raise ValueError(f"`stts_config` must be a JSON object, got {self.stts_config!r}: {error}") from error
        if not isinstance(fields, dict) or "prune_ratio" in fields:
            raise ValueError(f"`stts_config` must be a JSON object without `prune_ratio`, got {self.stts_config!r}.")
        return fields | ({} if self.prune_ratio is None else {"prune_ratio": self.prune_ratio})


def load(options: Options) -> tuple[Molmo2SttsForConditionalGeneration, Molmo2SttsProcessor]:
    """The model to begin with, and its processor."""
    folder = Path(options.model if Path(options.model).exists() else snapshot_download(options.model))
    before, config = (load_config(folder, fields) for fields in ({}, options.changed_fields()))
    changes = differences(before, config)
    if changes:
        logger.warning("The prune configuration of %s is changed: %s.", options.model, changes)
    processor = load_processor(folder)
    if options.num_frames is not None:
        processor.video_processor.num_frames, processor.video_processor.fps = options.num_frames, None
    return load_model(folder, config, options.dtype), processor


def differences(first: Molmo2SttsConfig, second: Molmo2SttsConfig) -> str:
    """Fields of `SttsConfig` that differ, in words; empty if none do."""
    first, second = (config.stts_config.to_diff_dict() for config in (first, second))
    names = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    return ", ".join(f"{name} from {first.get(name)} to {second.get(name)}" for name in names)


def make_trainer(options: Options, args: FinetuningArguments) -> FinetuningTrainer:
    """
    Reads the data and loads the model.

    Raises:
        OSError, ValueError: if an argument, the data or the model is not what it must be.
    """
    # All processes must make the same adapters.
    set_seed(args.seed)
    samples = [None if path is None else read_samples(path) for path in (options.data, options.eval_data)]
    model, processor = load(options)
    freeze(model, options.freeze)
    uses_original = model.config.stts_config.position_ids == "original"
    encoder = Encoder(processor, model.config.text_config.max_position_embeddings if uses_original else None)
    train_dataset, eval_dataset = (
        None if of_file is None else ConversationDataset(of_file, encoder, options.on_bad_video) for of_file in samples
    )
    if options.lora_rank:
        model = add_lora(model, options.lora_rank, options.lora_alpha, options.lora_dropout)
    if options.dtype != "float32" and not (args.bf16 or args.fp16):
        raise ValueError(f"Weights in {options.dtype} need mixed precision: --bf16.")
    return FinetuningTrainer(
        model,
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        data_collator=Collator(processor.tokenizer.pad_token_id, options.pack),
    )


def find_checkpoint(trainer: FinetuningTrainer) -> str | None:
    """
    The checkpoint to go on from: the one that was asked for, or else the last whole one.

    Raises:
        ValueError: if it was trained with another prune configuration.
    """
    checkpoint = trainer.args.resume_from_checkpoint or last_good_checkpoint(trainer.args.output_dir)
    if checkpoint is None:
        return None
    changes = differences(Molmo2SttsConfig.from_pretrained(checkpoint), trainer.base_model.config)
    if changes:
        raise ValueError(
            f"{checkpoint} was trained with another prune configuration; going on would change {changes}. Use another "
            "--output_dir, or begin with it as --model."
        )
    logger.warning("Going on from %s.", checkpoint)
    return str(checkpoint)


def finetune(options: Options, args: FinetuningArguments) -> dict[str, str]:
    """
    Trains, or goes on training, and saves the trained model.

    Returns:
        `dict[str, str]`: samples that were skipped, by file and line, and why.

    Raises:
        OSError, ValueError: as `make_trainer` and `find_checkpoint` do, or if a checkpoint cannot be written.
        FloatingPointError: if a gradient is not finite.
    """
    trainer = make_trainer(options, args)
    trainer.train(resume_from_checkpoint=find_checkpoint(trainer))
    if trainer.eval_dataset is not None and not trainer.is_evaluated():
        trainer.evaluate()
    trainer.save_state()
    trainer.save_final(Path(args.output_dir, "final"))
    return trainer.all_skipped()


def main() -> None:
    parser = HfArgumentParser([Options, FinetuningArguments], description=__doc__)
    try:
        options, args = parser.parse_args_into_dataclasses()
        skipped = finetune(options, args)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    if args.process_index == 0:
        reasons = "".join(f"\n  {where}: {reason}" for where, reason in skipped.items())
        print(f"finished: {args.output_dir}/final; {len(skipped)} samples skipped{reasons}")


if __name__ == "__main__":
    main()
