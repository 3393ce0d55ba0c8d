import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import finetune
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from finetuning.trainer import FinetuningArguments
from safetensors.torch import load_file, save_file
from training_inputs import training_model, training_processor, turns, write_mixed, write_rows, write_still

from hub_upload.build import build_hub_folder
from modeling_stts import Molmo2SttsForConditionalGeneration, Molmo2SttsProcessor


EXAMPLES = Path(__file__).parents[1] / "examples"
ANSWERS = ("zero", "one", "two", "three")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a model that trains in seconds."""
    folder = tmp_path_factory.mktemp("source") / "model"
    training_model().save_pretrained(folder)
    training_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four clips that look different, and a question about each."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(4):
        write_still(folder / f"{number}.mp4", 37 * number)
    rows = [turns("Which?", answer, video=f"{number}.mp4") for number, answer in enumerate(ANSWERS)]
    return write_rows(folder / "data.jsonl", rows)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return write_mixed(tmp_path_factory.mktemp("mixed"))


def run_command(monkeypatch, *options):
    """The command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, options)])
    finetune.main()


def run(monkeypatch, source, data, out, *args):
    options = ["--model", source, "--data", data, "--output_dir", out, "--logging_steps", 1, *args]
    run_command(monkeypatch, *options, "--use_cpu", "--disable_tqdm", "true")


def history(folder):
    (state,) = sorted(folder.glob("checkpoint-*/trainer_state.json"))[-1:]
    return json.loads(state.read_text())["log_history"]


def test_a_handful_of_clips_is_learned_and_the_result_is_a_hub_folder(monkeypatch, source, clips, tmp_path, capsys):
    rates = ["--learning_rate", 3e-3, "--vision_tower_learning_rate", 3e-3, "--connector_learning_rate", 3e-3]
    rates += ["--scorer_learning_rate", 1e-3, "--scorer_warmup_steps", 5, "--lr_scheduler_type", "constant"]
    steps = ["--max_steps", 40, "--save_steps", 40, "--per_device_train_batch_size", 4, "--eval_strategy", "steps"]
    ratios = ["--random_prune_ratios", 0.0, 0.5, 0.8, "--eval_prune_ratios", 0.0, 0.5, "--eval_steps", 20]
    run(monkeypatch, source, clips, tmp_path / "out", "--eval_data", clips, *rates, *steps, *ratios)
    assert "finished" in capsys.readouterr().out
    losses = [entry["loss"] for entry in history(tmp_path / "out") if "loss" in entry]
    assert losses[0] > 3 and max(losses[-5:]) < 0.3
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_answers" in entry] == [20, 40]
    accuracies = [entry["eval_accuracy_0.5"] for entry in history(tmp_path / "out") if "eval_accuracy_0.5" in entry]
    assert accuracies[-1] == 1 and accuracies[-1] >= accuracies[0]

    folder = build_hub_folder(tmp_path / "hub", tmp_path / "out" / "final")
    model = Molmo2SttsForConditionalGeneration.from_pretrained(folder)
    processor = Molmo2SttsProcessor.from_pretrained(folder)
    for number, answer in enumerate(ANSWERS):
        video = {"type": "video", "path": str(clips.parent / f"{number}.mp4")}
        content = [video, {"type": "text", "text": "Which?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False, prune_ratio=0.5)
        answered = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answered == answer


def test_the_same_command_goes_on_after_an_interruption(monkeypatch, source, mixed, tmp_path, capsys):
    args = ["--max_steps", 4, "--save_steps", 2, "--learning_rate", 1e-3, "--pack", "--num_frames", 2]
    args += ["--dataloader_num_workers", 1, "--per_device_train_batch_size", 2]
    run(monkeypatch, source, mixed, tmp_path / "out", *args)
    whole = load_file(tmp_path / "out" / "final" / "model.safetensors")
    shutil.rmtree(tmp_path / "out" / "final")
    # As a process leaves it that is killed while it saves.
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").write_text("")
    run(monkeypatch, source, mixed, tmp_path / "out", *args)
    rest = load_file(tmp_path / "out" / "final" / "model.safetensors")
    assert all(torch.equal(weight, rest[name]) for name, weight in whole.items())
    assert Molmo2SttsProcessor.from_pretrained(tmp_path / "out" / "final").video_processor.num_frames == 2


def test_a_molmo2_checkpoint_of_the_hub_gets_a_new_scorer(monkeypatch, source, mixed, tmp_path, caplog):
    native = tmp_path / "native"
    shutil.copytree(source, native)
    config = json.loads((native / "config.json").read_text())
    for name in ("auto_map", "custom_pipelines", "stts_config", "stts_release"):
        config.pop(name)
    (native / "config.json").write_text(json.dumps(config | {"model_type": "molmo2"}))
    weights = load_file(native / "model.safetensors")
    without = {name: weight for name, weight in weights.items() if "temporal_token_scorer" not in name}
    assert len(without) < len(weights)
    save_file(without, native / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(finetune, "snapshot_download", {"org/name": native}.__getitem__)
    run(monkeypatch, "org/name", mixed, tmp_path / "out", "--max_steps", 2, "--scorer_warmup_steps", 1)
    assert "Freshly initialised" in caplog.text
    trained = load_file(build_hub_folder(tmp_path / "hub", tmp_path / "out" / "final") / "model.safetensors")
    assert trained.keys() == weights.keys()


def test_lora_adapters_are_built_into_their_base(monkeypatch, source, mixed, tmp_path):
    args = ["--lora_rank", 2, "--max_steps", 2, "--scorer_warmup_steps", 1, "--learning_rate", 1e-2]
    run(monkeypatch, source, mixed, tmp_path / "out", *args)
    before = load_file(source / "model.safetensors")
    merged = build_hub_folder(tmp_path / "hub", source, adapter=tmp_path / "out" / "final")
    after = load_file(merged / "model.safetensors")
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    blocks = {name for name in before if name.startswith("model.transformer.blocks.") and "norm" not in name}
    assert changed == blocks | {name for name in before if "temporal_token_scorer" in name}


def test_a_changed_prune_configuration_is_said_and_never_taken_up_by_a_resumed_training(
    monkeypatch, source, mixed, tmp_path, caplog
):
    caplog.set_level("WARNING")
    args = ["--max_steps", 1, "--save_steps", 1]
    other = ["--prune_ratio", 0.8, "--stts_config", '{"position_ids": "compact"}']
    run(monkeypatch, source, mixed, tmp_path / "out", *args, *other)
    assert "position_ids from original to compact, prune_ratio from 0.5 to 0.8" in caplog.text
    assert json.loads((tmp_path / "out" / "final" / "config.json").read_text())["stts_config"]["prune_ratio"] == 0.8
    with pytest.raises(SystemExit, match="another prune configuration.* prune_ratio from 0.8 to 0.5"):
        run(monkeypatch, source, mixed, tmp_path / "out", *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--stts_config", "{"], "must be a JSON object, got '{'"),
        (["--stts_config", '{"prune_ratio": 0.3}'], "without `prune_ratio`"),
        (["--stts_config", '{"score_after_layer": 7}'], "leaves no block to prune in"),
        (["--prune_ratio", "1.5"], "0 <= prune_ratio < 1, got 1.5"),
        (["--freeze", "head"], "got 'head'"),
        (["--bf16", "--fp16"], "At most one of fp16 and bf16"),
        (["--dtype", "bfloat16"], "need mixed precision: --bf16"),
        (["--data", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["--model", "{tmp_path}"], "has no config.json"),
    ],
)
def test_bad_options_end_with_one_line(monkeypatch, source, mixed, tmp_path, args, message):
    args = [arg.replace("{tmp_path}", str(tmp_path)) for arg in args]
    with pytest.raises(SystemExit, match="error: ") as error:
        run(monkeypatch, source, mixed, tmp_path / "out", *args)
    assert message in str(error.value)


def test_skipped_videos_are_counted_in_the_end(monkeypatch, source, tmp_path, capsys):
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    data = write_rows(tmp_path / "data.jsonl", [turns("a", "b", video="bad.mp4"), turns("c", "d")])
    args = ["--max_steps", 2, "--per_device_train_batch_size", 1]
    run(monkeypatch, source, data, tmp_path / "out", *args, "--on_bad_video", "skip")
    assert f"1 samples skipped\n  {data}:1: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"data\.jsonl:1: .*bad\.mp4"):
        run(monkeypatch, source, data, tmp_path / "again", *args)


@pytest.fixture
def for_two(source, clips):
    """Options of a training in which one process of two may have a batch without a video."""
    texts = [turns("Which?", answer) for answer in ANSWERS]
    videos = [turns("Which?", answer, video=f"{number}.mp4") for number, answer in enumerate(ANSWERS)]
    data = write_rows(clips.parent / "pairs.jsonl", [texts[0], videos[0], texts[1], texts[2]])
    options = ["--model", source, "--data", data, "--eval_data", data, "--logging_steps", 1, "--disable_tqdm", "true"]
    options += ["--max_steps", 2, "--save_steps", 2, "--per_device_train_batch_size", 1, "--learning_rate", 1e-3]
    return [*options, "--scorer_warmup_steps", 1, "--random_prune_ratios", 0.0, 0.5]


def check_same_training(one, two, rel):
    """That two processes have trained as one, and that what they saved loads on one device."""
    for name in ("loss", "grad_norm", "scorer_grad_norm", "kept_share"):
        of_one, of_two = ([entry[name] for entry in history(out) if name in entry] for out in (one, two))
        assert of_one and of_two == pytest.approx(of_one, rel=rel), (two, name)
    assert {path.name for path in (two / "final").iterdir()} == {path.name for path in (one / "final").iterdir()}
    expected, weights = (
        Molmo2SttsForConditionalGeneration.from_pretrained(out / "final").state_dict() for out in (one, two)
    )
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=10 * rel, atol=rel)


def test_two_processes_train_as_one_and_a_batch_without_a_video_does_not_stop_them(monkeypatch, for_two, tmp_path):
    """With DDP and with FSDP2, whose checkpoints load on one device."""
    one = ["--output_dir", tmp_path / "one", "--gradient_accumulation_steps", 2]
    run_command(monkeypatch, *for_two, "--use_cpu", *one)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, Path(__file__).with_name("two_processes.py"), tmp_path, *for_two, "--use_cpu"]
    processes = [
        subprocess.Popen(
            list(map(str, command)),
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    for kind in ("ddp", "fsdp2"):
        check_same_training(tmp_path / "one", tmp_path / kind, rel=1e-4)
    assert (tmp_path / "fsdp2" / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(for_two, tmp_path):
    launches = {
        "one": ["--num_processes", 1, "--gpu_ids", 0],
        **{kind: ["--config_file", EXAMPLES / "finetuning" / f"{kind}.yaml"] for kind in ("ddp", "fsdp2")},
    }
    for kind, launch in launches.items():
        options = [*for_two, "--output_dir", tmp_path / kind]
        if kind == "one":
            options += ["--gradient_accumulation_steps", 2]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, EXAMPLES / "finetune.py", *options]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("ddp", "fsdp2"):
        check_same_training(tmp_path / "one", tmp_path / kind, rel=1e-3)


@pytest.mark.parametrize(("name", "distributed_type"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_the_configurations_for_accelerate_are_ones(name, distributed_type):
    config = load_config_from_file(str(EXAMPLES / "finetuning" / f"{name}.yaml"))
    assert config.distributed_type.name == distributed_type
    if name == "fsdp2":
        wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
        assert any(type(module).__name__ == wrapped for module in training_model().modules())


def test_arguments_of_transformers_keep_their_names():
    args = FinetuningArguments("out", use_cpu=True)
    assert args.remove_unused_columns is False and args.ddp_find_unused_parameters is False
