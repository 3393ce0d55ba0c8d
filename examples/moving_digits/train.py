"""Trains the small model on one GPU, in slices that resume exactly; frames are rendered as they are needed.

    python examples/moving_digits/train.py PICTURES --stage pictures --steps 2400 --frames-per-batch 256
    python examples/moving_digits/train.py BASE --init PICTURES/final --rule unpruned --steps 4800 --easy-steps 1000
    python examples/moving_digits/train.py STTS --init BASE/final --rule stts --steps 1600
    python examples/moving_digits/train.py STTS --init BASE/final --rule stts --steps 1600 --minutes 9   # a slice

OUT/final holds the trained model as `save_pretrained` writes it. Checkpoints stand beside it, and a training that was
stopped goes on from the last one when the same command is given again: batch `i` depends on the seed and on `i` alone,
so none is lost or repeated.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import torch
from conversations import Conversations, render_inputs
from model import make_model, make_processor, make_tokenizer
from pictures import PictureLearner, Pictures
from render import Renderer
from rules import RULES, apply_rule
from scenes import MAX_SEED
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from modeling_stts import Molmo2SttsForConditionalGeneration, Molmo2SttsProcessor


STAGES = ("videos", "pictures")
PRUNE_RATIOS = [0.0, 0.3, 0.5, 0.7, 0.8, 0.9]
LOG_EVERY = 50
COOL_DOWN = 0.3  # share of the steps in which learning rates fall; what is not learned before hardly is then
SCORER, VISION = r"\.scorer\.", r"\.(vision_tower|multi_modal_projector)\."


class SceneTrainer(Trainer):
    """
    Differences from `Trainer`: batches come in the order of the data set, their frames are rendered on the model's
    device, the share of answers whose first token is right is logged for each set, and a step whose gradients are not
    all finite is left out and counted.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.renderer = Renderer("train", self.args.device)
        self.right = {}
        self.skipped = torch.zeros((), device=self.args.device)

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)

    def _prepare_inputs(self, inputs):
        layout, seed = inputs.pop("layout"), inputs.pop("seed")
        return {**super()._prepare_inputs(inputs), **render_inputs(layout, self.renderer, seed)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        name = inputs.pop("name")
        outputs = model(**inputs)
        self.right[name] = self.right.get(name, 0) + self.count_right(outputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        is_bad = ~torch.isfinite(nn.utils.get_total_norm(gradients))
        self.skipped += is_bad
        # What mixed precision with a gradient scaler uses: the fused optimizer looks at it without waiting for it.
        self.optimizer.optimizer.found_inf = is_bad.float()
        return loss

    def count_right(self, outputs) -> torch.Tensor:
        """Right answers and all answers."""
        labels = outputs.labels[:, 1:]
        is_first = (labels != -100) & (outputs.labels[:, :-1] == -100)
        is_right = is_first & (outputs.logits[:, :-1].argmax(-1) == labels)
        return torch.stack([is_right.sum(), is_first.sum()]).float()

    def log(self, logs, *args, **kwargs):
        for name, right in self.right.items():
            logs[f"{name}_right"] = round((right[0] / right[1]).item(), 4)
        self.right = {}
        logs["skipped_steps"] = self.skipped.item()
        super().log(logs, *args, **kwargs)


class StopAfter(TrainerCallback):
    """Saves a checkpoint and stops after some minutes."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() >= self.end:
            control.should_save = control.should_training_stop = True


def make_optimizer(
    model: nn.Module, args: argparse.Namespace
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with three learning rates: warmed up, constant, and in the end lowered to zero."""
    rates = {SCORER: args.scorer_learning_rate, VISION: args.vision_learning_rate, "": args.learning_rate}
    groups: dict[str, list[nn.Parameter]] = {part: [] for part in rates}
    for name, weight in model.named_parameters():
        groups[next(part for part in rates if re.search(part, name))].append(weight)
    optimizer = torch.optim.AdamW(
        [{"params": weights, "lr": rates[part]} for part, weights in groups.items()],
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=True,
    )

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / args.warm_up_steps, (args.steps - step) / (COOL_DOWN * args.steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def load(args: argparse.Namespace) -> tuple[Molmo2SttsForConditionalGeneration, Molmo2SttsProcessor]:
    """The model to begin with and its processor."""
    if args.init is not None:
        model = Molmo2SttsForConditionalGeneration.from_pretrained(args.init, dtype=torch.float32)
        return model, Molmo2SttsProcessor.from_pretrained(args.init)
    tokenizer = make_tokenizer()
    return make_model(tokenizer, args.seed), make_processor(tokenizer)


def make_stage(
    model: Molmo2SttsForConditionalGeneration, processor: Molmo2SttsProcessor, args: argparse.Namespace
) -> tuple[nn.Module, Dataset]:
    """What is trained, and on what."""
    if args.stage == "pictures":
        return PictureLearner(model), Pictures(processor, args.steps, args.seed, args.frames_per_batch)
    apply_rule(model, args.rule)
    prune_ratios = [0.0] if args.rule == "unpruned" else PRUNE_RATIOS
    return model, Conversations(
        processor,
        args.steps,
        args.seed,
        frames_per_batch=args.frames_per_batch,
        prune_ratios=prune_ratios,
        num_easy=args.easy_steps,
        has_gaps=model.config.stts_config.position_ids == "original",
    )


def train(args: argparse.Namespace) -> bool:
    """Trains or goes on training; returns whether the training is finished."""
    model, processor = load(args)
    trained, batches = make_stage(model, processor, args)
    trainer = SceneTrainer(
        model=trained,
        args=TrainingArguments(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=1,
            bf16=torch.cuda.is_available(),
            logging_steps=LOG_EVERY,
            save_steps=args.save_steps,
            save_total_limit=1,
            dataloader_num_workers=args.workers,
            dataloader_prefetch_factor=4 if args.workers else None,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            report_to="none",
            seed=args.seed,
            disable_tqdm=not sys.stderr.isatty(),
        ),
        train_dataset=batches,
        data_collator=lambda items: items[0],
        optimizers=make_optimizer(trained, args),
        callbacks=[StopAfter(args.minutes)] if args.minutes else [],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.out) if args.out.is_dir() else None)
    is_finished = trainer.state.global_step >= args.steps
    if is_finished:
        unfinished = args.out / "unfinished"
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        unfinished.rename(args.out / "final")
    return is_finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for checkpoints and the trained model")
    parser.add_argument("--stage", choices=STAGES, default=STAGES[0], help="what is learned")
    parser.add_argument("--rule", choices=RULES, default="stts", help="how windows are chosen")
    parser.add_argument("--init", type=Path, help="folder of a model to begin with; random weights if not given")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--easy-steps", type=int, default=0, help="at first, in which videos have few digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; the same command goes on later")
    parser.add_argument("--frames-per-batch", type=int, default=384)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--vision-learning-rate", type=float, default=1e-3, help="of the ViT and the connector")
    parser.add_argument("--scorer-learning-rate", type=float, default=1e-4)
    parser.add_argument("--warm-up-steps", type=int, default=200)
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--workers", type=int, default=4, help="processes that draw scenes and write conversations")
    args = parser.parse_args()
    if not 0 <= args.seed <= MAX_SEED:
        parser.error(f"--seed must be from 0 to {MAX_SEED}, got {args.seed}")
    is_finished = train(args)
    print(f"{'finished' if is_finished else 'stopped; the same command goes on'}: {args.out}")


if __name__ == "__main__":
    main()
