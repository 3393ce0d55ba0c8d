"""Runs finetune.py as a process of several on CPUs, with DDP, then with FSDP2 by the settings of fsdp2.yaml.

    RANK=0 WORLD_SIZE=2 ... python tests/two_processes.py OUT --model ... --data ...

accelerate shards on GPUs only, so it is told that the processes have some.
"""

import os
import sys
from pathlib import Path

import torch
import yaml
from accelerate import DistributedType, PartialState
from transformers import HfArgumentParser


EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from finetune import FinetuningArguments, Options, finetune  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    out, *options = sys.argv[1:]
    parser = HfArgumentParser([Options, FinetuningArguments])
    finetune(*parser.parse_args_into_dataclasses([*options, "--output_dir", f"{out}/ddp"]))
    config = yaml.safe_load((EXAMPLES / "finetuning" / "fsdp2.yaml").read_text())["fsdp_config"]
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    # As `accelerate launch` hands them over.
    for name, value in config.items():
        name = name.replace("transformer_layer_cls", "transformer_cls").upper()
        os.environ[name] = str(value).lower() if isinstance(value, bool) else str(value)
    parsed = parser.parse_args_into_dataclasses([*options, "--output_dir", f"{out}/fsdp2"])
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    finetune(*parsed)


if __name__ == "__main__":
    main()
