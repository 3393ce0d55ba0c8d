"""What fits into memory: a training step on one video, at the shapes of Molmo2-4B with random weights.

    python examples/measure_memory.py                                  # one CUDA device; minutes
    python examples/measure_memory.py --num-frames 64 128 --modes lora
    python examples/measure_memory.py --tiny                           # the tiny model on a CPU, to try the script

Weights are bfloat16. Mode `full` trains all with AdamW, whose state is bfloat16 too; `lora` trains adapters of rank 16
and the scorer in float32. Activations of the blocks are recomputed in the backward pass (`--gradient_checkpointing` of
finetune.py) unless --no-checkpointing. `saved` is what the forward pass keeps for the backward pass; `peak`, on CUDA
devices, is the most that was allocated at once, weights and the optimizer's state included. On a CPU pruned blocks run
with a mask, which is saved too: figures of different ratios above 0 compare there, but not with those of ratio 0.
"""

import argparse
import gc
import weakref

import torch
import transformers
from finetuning.forward import replace_forward
from finetuning.groups import add_lora, freeze
from speed.shapes import SIZES, make_inputs
from torch import nn
from torch.nn import functional as F

from hub_upload.tiny import tiny_config
from modeling_stts import Molmo2SttsConfig, Molmo2SttsForConditionalGeneration


MODES = ("full", "lora")
ANSWER = 32  # tokens


def build(config: Molmo2SttsConfig, mode: str, checkpointing: bool, device: str) -> nn.Module:
    """
    Args:
        config (`Molmo2SttsConfig`): shapes.
        mode (`str`): one of `MODES`.
        checkpointing (`bool`): whether blocks are recomputed in the backward pass.
        device (`str`): such as `"cuda"`.

    Returns:
        `nn.Module`: the model to train, whose `forward` is `training_forward`.
    """
    default = torch.get_default_dtype()
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = Molmo2SttsForConditionalGeneration(config).train()
        torch.set_default_dtype(default)
    freeze(model, [])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    replace_forward(model)
    return add_lora(model, rank=16, alpha=32, dropout=0.0) if mode == "lora" else model


def make_batch(num_frames: int, config: Molmo2SttsConfig, device: str) -> dict[str, torch.Tensor]:
    """One video with a prompt as the processor lays it out, and an answer, as `Collator` hands them over."""
    prompt = make_inputs(config, num_frames, 1, torch.device(device))
    ids = F.pad(prompt["input_ids"], (0, ANSWER), value=20)
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    return {
        "input_ids": ids,
        "labels": labels,
        "mm_token_type_ids": F.pad(prompt["mm_token_type_ids"], (0, ANSWER)),
        "sample_idx": torch.ones_like(ids),
        "is_video": torch.tensor([True]),
        **{name: prompt[name] for name in ("pixel_values_videos", "video_token_pooling", "video_grids")},
    }


class Saved:
    """A tensor that the forward pass keeps. It lives as long as the graph needs it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what the forward pass keeps for the backward pass, weights left out, each memory once."""

    def __init__(self, model: nn.Module):
        super().__init__(self._pack, lambda saved: saved.tensor)
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.saved = weakref.WeakSet()

    def _pack(self, tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        self.saved.add(saved)
        return saved

    def total(self) -> int:
        """Bytes that are kept now."""
        memories = (saved.tensor.untyped_storage() for saved in self.saved)
        sizes = {memory.data_ptr(): memory.nbytes() for memory in memories}
        return sum(size for pointer, size in sizes.items() if pointer not in self.weights)


def training_loss(model: nn.Module, batch: dict, ratio: float) -> torch.Tensor:
    """
    Args:
        ratio (`float`): fraction of windows to remove.

    Returns:
        `torch.Tensor`: what is minimized, computed in mixed precision.
    """
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        outputs = model(**batch, prune_ratio=ratio)
        return outputs.language_loss + outputs.temporal_loss


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict, ratio: float) -> int:
    """
    Runs one step.

    Args:
        ratio (`float`): fraction of windows to remove.

    Returns:
        `int`: bytes that the forward pass kept for the backward pass.
    """
    saved = SavedBytes(model)
    with saved:
        loss = training_loss(model, batch, ratio)
    num_bytes = saved.total()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return num_bytes


def measure(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict, ratio: float
) -> tuple[float, float | None] | None:
    """
    Returns:
        `tuple[float, float | None]`: GB that are saved, and the peak in GB on a CUDA device; `None` where it does not
        fit.
    """
    is_cuda = batch["input_ids"].is_cuda
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        saved = train_step(model, optimizer, batch, ratio)
    except torch.OutOfMemoryError:
        optimizer.zero_grad()
        return None
    return saved / 1e9, torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None


def describe(measured: tuple[float, float | None] | None) -> str:
    if measured is None:
        return "does not fit"
    saved, peak = measured
    return f"{saved:.3g}" if peak is None else f"{peak:.1f} ({saved:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-frames", type=int, nargs="+", default=[32, 64, 128, 256, 384])
    parser.add_argument("--prune-ratios", type=float, nargs="+", default=[0.0, 0.5, 0.8])
    parser.add_argument("--modes", choices=MODES, nargs="+", default=MODES)
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--tiny", action="store_true", help="the tiny model on a CPU")
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    config = tiny_config() if args.tiny else Molmo2SttsConfig(**SIZES["4b"])
    name = "tiny model, CPU, saved GB" if args.tiny else f"{torch.cuda.get_device_name()}, peak (saved) GB"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    print("| mode | frames |", *(f"{ratio:.0%} pruned |" for ratio in args.prune_ratios))
    print("|---|---|", *("---|" for _ in args.prune_ratios), sep="")
    for mode in args.modes:
        model = build(config, mode, not args.no_checkpointing, device)
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-6)
        # The optimizer's state is made in the first step.
        train_step(model, optimizer, make_batch(2, config, device), 0.5)
        for num_frames in args.num_frames:
            batch = make_batch(num_frames, config, device)
            cells = []
            for ratio in args.prune_ratios:
                cells.append(describe(measure(model, optimizer, batch, ratio)))
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
            print(f"| {mode} | {num_frames} |", *(f"{cell} |" for cell in cells), flush=True)
        # Models refer to themselves: without collecting, the next mode would be measured on top of this one.
        del model, optimizer
        gc.collect()


if __name__ == "__main__":
    main()
