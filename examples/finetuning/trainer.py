"""`Trainer` with what the training of a pruning model needs beside it."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from modeling_stts import Molmo2SttsForConditionalGeneration
from modeling_stts.configuration_stts import check_prune_ratio
from modeling_stts.stts_selection import PrunePlan, plan_pruning

from .collator import GRIDS, MEDIA_INPUTS
from .forward import TrainingOutput, replace_forward
from .groups import GROUPS, group_of, group_weights
from .schedule import PruneSchedule, make_lr_scheduler


STATE_FILE = "trainer_state.json"
# Sums over the batches of a logging interval.
SUMS = (
    "steps",
    "language_loss",
    "temporal_loss",
    "scorer_grad_norm",
    "tokens",
    "frames",
    "windows",
    "kept",
    "scores",
    "score_sum",
    "score_square_sum",
)

logger = logging.get_logger(__name__)


@dataclass
class FinetuningArguments(TrainingArguments):
    """
    `TrainingArguments`, with rates for the parts of the model (`learning_rate` is the language model's) and the
    schedule of the prune ratio. Some of its own defaults differ.
    """

    scorer_learning_rate: float = field(default=1e-4, metadata={"help": "Of the scorer."})
    vision_tower_learning_rate: float = field(default=5e-6, metadata={"help": "Of the ViT."})
    connector_learning_rate: float = field(default=5e-6, metadata={"help": "Of the connector."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Of the language model or its adapters."})
    scorer_warmup_steps: int = field(default=200, metadata={"help": "Steps in which the scorer's rate grows from 0."})
    prune_warmup_steps: int = field(default=0, metadata={"help": "Steps in which the prune ratio grows from 0."})
    random_prune_ratios: list[float] = field(
        default_factory=list, metadata={"help": "Every step draws one of these instead of the model's ratio."}
    )
    eval_prune_ratios: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 0.8], metadata={"help": "Ratios at which accuracy is measured."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be false: batches are no columns."})
    # Every trained weight takes part in every step.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "See TrainingArguments."})
    logging_steps: float = field(default=10, metadata={"help": "See TrainingArguments."})
    # Trainer would put another number in the place of a loss that is not finite, which stops this training.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "See TrainingArguments."})


class FinetuningTrainer(Trainer):
    """
    Differences from `Trainer`:
    - batches are those of `Collator`, and the model runs `training_forward`, at the step's prune ratio;
    - the language loss is a mean over all labels, and the temporal loss over all compared windows, of an optimizer
      step: whatever stands on one device, in one batch or in one row, the loss is the same;
    - groups of weights have learning rates and warm-ups of their own;
    - the parts of the loss, what the scorer does, and the speed are logged;
    - a gradient that is not finite stops the training, with the samples named;
    - `evaluate` measures accuracy at several prune ratios;
    - a checkpoint that cannot be written whole is removed.

    Args:
        model: as loaded, or with adapters of PEFT; its `forward` is replaced.
        args (`FinetuningArguments`), kwargs: as for `Trainer`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, model: nn.Module, args: FinetuningArguments, **kwargs):
        self.base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.stts_config = self.base_model.config.stts_config
        self.schedule = PruneSchedule(
            self.stts_config.prune_ratio, tuple(args.random_prune_ratios), args.prune_warmup_steps, args.seed
        )
        self.schedule.check()
        for ratio in args.eval_prune_ratios:
            check_prune_ratio(ratio)
        if not args.max_grad_norm > 0:
            raise ValueError(f"`max_grad_norm` must be above 0, got {args.max_grad_norm}; a large one never clips.")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs need a process each: start with `accelerate launch`, or show only one."
            )
        replace_forward(self.base_model)
        super().__init__(model, args, **kwargs)
        # Makes `Trainer` leave the scaling of the loss to `compute_loss`.
        self.model_accepts_loss_kwargs = True
        if self.is_fsdp_enabled:
            _keep_losses_precise(self.accelerator.state.fsdp_plugin)
        self.step_losses: list[tuple[list[str], torch.Tensor]] = []
        self.skipped: dict[str, str] = {}
        self.sums = self._no_sums()
        # When the first batch of the logging interval was asked for.
        self.clock: float | None = None

    # ---- Loss ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        self.clock = self.clock or time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        self.step_losses = []
        ratio = self.schedule.ratio(self.state.global_step)
        labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        compared = sum(_count_compared(plan) for batch in batches if (plan := self._plan(batch, ratio)))
        totals = torch.tensor([[labels, compared]], device=device)
        return batches, self.accelerator.gather(totals).sum(0)

    def _plan(self, batch: dict[str, Any], ratio: float) -> PrunePlan | None:
        grids = batch.get(MEDIA_INPUTS["video"][GRIDS])
        return None if grids is None else plan_pruning(grids.tolist(), ratio, self.stts_config.prune_from_frame)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        where, skipped = inputs.pop("where"), inputs.pop("skipped")
        self._note_skipped(skipped)
        num_labels, num_compared = num_items_in_batch.clamp(min=1).unbind()
        ratio = self.schedule.ratio(self.state.global_step)
        plan = self._plan(inputs, ratio)
        outputs = model(**inputs, prune_ratio=ratio)
        language_loss = outputs.language_loss / num_labels
        temporal_loss = outputs.temporal_loss * (_count_compared(plan) if plan else 0) / num_compared
        loss = language_loss + self.stts_config.temporal_loss_weight * temporal_loss
        self.step_losses.append((where, loss.detach()))
        self._add_sums(outputs, plan, language_loss=language_loss, temporal_loss=temporal_loss)
        # Gradients are averaged over processes, and these losses are parts of one sum.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _note_skipped(self, skipped: dict[str, str]) -> None:
        for where, reason in skipped.items():
            if where not in self.skipped:
                logger.warning("Skipped %s: %s", where, reason)
        self.skipped.update(skipped)

    def all_skipped(self) -> dict[str, str]:
        """What was skipped in all processes, and why; every one of them must ask."""
        return dict(sorted(gather_object(list(self.skipped.items()))))

    # ---- Learning rates ----

    def create_optimizer(self, model=None):
        model = self.model if model is None else model
        if self.optimizer is None:
            groups = group_weights(model, self.get_decay_parameter_names(model))
            rates = {name: getattr(self.args, f"{name}_learning_rate", self.args.learning_rate) for name in GROUPS}
            for group in groups:
                group["lr"] = rates[group["group"]]
                group["weight_decay"] = self.args.weight_decay if group.pop("decays") else 0.0
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            steps = dict.fromkeys(GROUPS, self.args.get_warmup_steps(num_training_steps))
            self.lr_scheduler = make_lr_scheduler(
                self.optimizer if optimizer is None else optimizer,
                self.args.lr_scheduler_type,
                num_training_steps,
                steps | {"scorer": self.args.scorer_warmup_steps},
                **(self.args.lr_scheduler_kwargs or {}),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- Gradients ----

    def _clip_grad_norm(self, model):
        gradients = [
            weight.grad
            for name, weight in model.named_parameters()
            if group_of(name) == "scorer" and weight.grad is not None
        ]
        scorer_norm = _plain(nn.utils.get_total_norm(gradients))
        norm = super()._clip_grad_norm(model)
        # The norm is that of all processes, so that all of them stop here.
        if not math.isfinite(_plain(norm)):
            raise FloatingPointError(self._describe_step(float(_plain(norm))))
        # The same in all processes, whose sums are added up.
        share = 1 / self.accelerator.num_processes
        self._add(steps=share, scorer_grad_norm=share * scorer_norm)
        return norm

    def _describe_step(self, norm: float) -> str:
        batches = "".join(f"\n  loss {loss.item():.4g}: {', '.join(where)}" for where, loss in self.step_losses)
        return (
            f"The gradient of step {self.state.global_step + 1} is not finite (norm {norm}), so the training stops "
            f"before it changes a weight. Batches of this step in process {self.args.process_index}:{batches}"
        )

    # ---- Logs ----

    def _no_sums(self) -> torch.Tensor:
        return torch.zeros(len(SUMS), dtype=torch.float64, device=self.args.device)

    def _add(self, **sums: torch.Tensor | float) -> None:
        for name, value in sums.items():
            self.sums[SUMS.index(name)] += value

    def _add_sums(self, outputs: TrainingOutput, plan: PrunePlan | None, **losses: torch.Tensor) -> None:
        scores, score_sum, score_square_sum = outputs.score_sums
        self._add(
            **{name: loss.detach() for name, loss in losses.items()},
            tokens=outputs.num_tokens,
            frames=sum(plan.num_frames) if plan else 0,
            windows=outputs.num_windows,
            kept=outputs.num_kept,
            scores=scores,
            score_sum=score_sum,
            score_square_sum=score_square_sum,
        )

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs |= self._summarize()
        super().log(logs, *args, **kwargs)

    def _summarize(self) -> dict[str, float]:
        """Means over the steps since the last time, of all processes."""
        sums = dict(zip(SUMS, self.accelerator.gather(self.sums[None]).sum(0).tolist()))
        seconds = time.perf_counter() - self.clock
        self.sums, self.clock = self._no_sums(), None
        summary = {name: sums[name] / sums["steps"] for name in ("language_loss", "scorer_grad_norm")}
        summary["prune_ratio"] = self.schedule.ratio(self.state.global_step - 1)
        if sums["windows"] > 0:
            summary["kept_share"] = sums["kept"] / sums["windows"]
        if sums["scores"] > 0:
            mean = sums["score_sum"] / sums["scores"]
            variance = sums["score_square_sum"] / sums["scores"] - mean**2
            summary |= {"score_mean": mean, "score_std": math.sqrt(max(0.0, variance))}
            summary["temporal_loss"] = sums["temporal_loss"] / sums["steps"]
        summary |= {f"{name}_per_second": sums[name] / seconds for name in ("tokens", "frames")}
        return {name: round(value, 6) for name, value in summary.items()}

    @contextmanager
    def _clock_stopped(self):
        start = time.perf_counter()
        yield
        if self.clock is not None:
            self.clock += time.perf_counter() - start

    # ---- Accuracy ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Accuracy at every ratio of `eval_prune_ratios`: the share of the assistant's turns of which every token is the
        likeliest after those before it, which is when greedy generation would give the same turn, at the price of one
        forward pass. Earlier turns are given as they are in the conversation.

        Returns:
            `dict[str, float]`: such as `eval_accuracy_0.5`, in [0, 1]; `eval_answers` is the number of turns.
        """
        with self._clock_stopped():
            counts = self._count_right(self.get_eval_dataloader(eval_dataset))
        metrics = {f"{metric_key_prefix}_answers": sum(total for _, total in next(iter(counts.values())).values())}
        for ratio, of_samples in counts.items():
            right = sum(right for right, _ in of_samples.values())
            metrics[f"{metric_key_prefix}_accuracy_{ratio}"] = right / metrics[f"{metric_key_prefix}_answers"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def is_evaluated(self) -> bool:
        """Whether accuracy was measured after the last step."""
        steps = [entry["step"] for entry in self.state.log_history if "eval_answers" in entry]
        return steps[-1:] == [self.state.global_step]

    @torch.no_grad()
    def _count_right(self, batches) -> dict[float, dict[str, tuple[int, int]]]:
        """Right answers and all answers of every sample, at every ratio, of all processes."""
        model = self.model.eval()
        counts: dict[float, dict[str, tuple[int, int]]] = {ratio: {} for ratio in self.args.eval_prune_ratios}
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            where, skipped = inputs.pop("where"), inputs.pop("skipped")
            self._note_skipped(skipped)
            for ratio, of_samples in counts.items():
                outputs = model(**inputs, prune_ratio=ratio)
                for number, name in enumerate(where, start=1):
                    right = outputs.answers_right[outputs.answers_sample == number]
                    of_samples[name] = (int(right.sum()), len(right))
        # By name: batches are filled up with samples that other processes have too.
        return {ratio: dict(gather_object(list(of_samples.items()))) for ratio, of_samples in counts.items()}

    # ---- Checkpoints ----

    def _save_checkpoint(self, *args, **kwargs) -> None:
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with self._clock_stopped(), self._whole_or_nothing(folder):
            super()._save_checkpoint(*args, **kwargs)

    def save_final(self, folder: Path) -> None:
        """
        Saves the model, or its adapters, and the processor; all processes must call it.

        Args:
            folder (`Path`): what `from_pretrained` and `hub_upload build` take.

        Raises:
            OSError: if it cannot be written.
        """
        with self._whole_or_nothing(folder):
            self.save_model(str(folder))

    @contextmanager
    def _whole_or_nothing(self, folder: Path):
        try:
            yield
        except Exception as error:
            # Half a checkpoint is good for nothing, and a full disk needs the room.
            shutil.rmtree(folder, ignore_errors=True)
            good = last_good_checkpoint(self.args.output_dir)
            raise OSError(f"{folder} could not be written ({error}). The last good checkpoint is {good}.") from error

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        # FSDP makes classes on the fly in a file of torch, which would be copied into the checkpoint as the model's.
        if type(self.base_model) is not Molmo2SttsForConditionalGeneration:
            type(self.base_model).__module__ = Molmo2SttsForConditionalGeneration.__module__
        super()._save(output_dir, state_dict)
        if self.model is not self.base_model and self.args.should_save:
            # Beside adapters, to say what they were trained with.
            self.base_model.config.save_pretrained(output_dir or self.args.output_dir)


def last_good_checkpoint(output_dir: str | Path) -> Path | None:
    """
    The last checkpoint that was written to its end; another one was interrupted.

    Args:
        output_dir (`str` or `Path`): where checkpoints are; need not exist.
    """
    good = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            # The state is what is written last.
            good.append((json.loads((folder / STATE_FILE).read_bytes())["global_step"], folder))
        except (OSError, ValueError, KeyError):
            logger.warning("%s is not a whole checkpoint; its writing was interrupted.", folder)
    return max(good, default=(0, None))[1]


def _keep_losses_precise(plugin) -> None:
    """Lets FSDP2 add up gradients, and hand over losses and counts, in float32; accelerate rounds both."""
    if plugin.fsdp_version != 2:
        raise ValueError(f"Only version 2 of FSDP works here, got {plugin.fsdp_version}; see fsdp2.yaml.")
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def _count_compared(plan: PrunePlan) -> int:
    """Windows that the temporal loss compares with the frame before: those of pruned videos."""
    return sum((n - 1) * plan.num_windows for n, pruned in zip(plan.num_frames, plan.num_pruned) if pruned > 0)


def _plain(norm: torch.Tensor) -> torch.Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
