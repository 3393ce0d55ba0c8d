"""Prefill time of one video at the shapes of Molmo2-4B, random weights, bfloat16: native transformers and STTS.

    python examples/measure_speed.py                       # one CUDA device
    python examples/measure_speed.py --num-frames 64 128

Native Molmo2, STTS at ratio 0 and STTS pruned run in turns on the same input; each figure is the median of the runs.
"""

import argparse
import statistics

import torch
import transformers
from transformers import Molmo2Config, Molmo2ForConditionalGeneration

from modeling_stts import Molmo2SttsConfig, Molmo2SttsForConditionalGeneration


ADAPTER = {"text_hidden_size": 2560, "intermediate_size": 9728}
TEXT = {
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "max_position_embeddings": 65536,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
WARM_UP, RUNS = 2, 7


def build(config_class, model_class):
    config = config_class(adapter_config=dict(ADAPTER), text_config=dict(TEXT))
    with torch.device("cuda"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = model_class(config).eval()
        torch.set_default_dtype(default)
    return model


def make_inputs(num_frames, config):
    """A prompt as the processor lays it out: a timestamp, the frame's 81 tokens, and a question at the end."""
    frame = [11, 12, 13, config.frame_start_token_id, *[config.image_patch_id] * 81, config.frame_end_token_id]
    ids = torch.tensor([[1, *frame * num_frames, *[20] * 20]], device="cuda")
    windows = torch.arange(729).view(9, 3, 9, 3).permute(0, 2, 1, 3).reshape(81, 9)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_patch_id).long(),
        "pixel_values_videos": torch.randn(num_frames, 729, 588, device="cuda"),
        "video_token_pooling": (torch.arange(num_frames).view(-1, 1, 1) * 729 + windows).view(-1, 9).cuda(),
        "video_grids": torch.tensor([[num_frames, 9, 9]]),
        "logits_to_keep": 1,
    }


def milliseconds(model, **inputs):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    model(**inputs)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-frames", type=int, nargs="+", default=[32, 64, 128, 256])
    args = parser.parse_args()
    native = build(Molmo2Config, Molmo2ForConditionalGeneration)
    stts = build(Molmo2SttsConfig, Molmo2SttsForConditionalGeneration)
    candidates = {
        "native": (native, {}),
        "ratio 0": (stts, {"prune_ratio": 0.0}),
        "50%": (stts, {"prune_ratio": 0.5}),
        "80%": (stts, {"prune_ratio": 0.8}),
    }
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print("| frames | native ms | ratio 0 ms | 50% pruned ms | speed-up | 80% pruned ms | speed-up |")
    print("|---|---|---|---|---|---|---|")
    for num_frames in args.num_frames:
        inputs = make_inputs(num_frames, stts.config)
        times = {name: [] for name in candidates}
        for run in range(WARM_UP + RUNS):
            for name, (model, kwargs) in candidates.items():
                elapsed = milliseconds(model, **inputs, **kwargs)
                if run >= WARM_UP:
                    times[name].append(elapsed)
        native_ms, off_ms, half_ms, fifth_ms = (statistics.median(times[name]) for name in candidates)
        half, fifth = f"{half_ms:.0f} | {native_ms / half_ms:.2f}", f"{fifth_ms:.0f} | {native_ms / fifth_ms:.2f}"
        print(f"| {num_frames} | {native_ms:.0f} | {off_ms:.0f} | {half} | {fifth} |", flush=True)


if __name__ == "__main__":
    main()
