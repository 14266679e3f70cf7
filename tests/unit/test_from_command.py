"""Old command lines become suites that load and plan; what they could not carry over is told."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.cell import Cell
from bench.cli import _exit_code
from bench.coati_command import SCRIPTS, read_command
from bench.errors import MachineError, UserError
from bench.from_command import STRATEGIES, UNUSED, suite_from_command, write_suite
from bench.matrix import make_plan

SFT = (
    "torchrun --standalone --nproc_per_node=1 train_sft.py --pretrain bigscience/bloom-560m --model bloom --strategy naive "
    "--dataset InstructionWild/data/instinwild_en.json --save_path stage_1 --max_datasets_size 512 --batch_size 1 "
    "--accimulation_steps 8 --lr 2e-5 --max_epochs 1 --lora_rank 16"
)
RM = (
    'python3 train_reward_model.py --pretrain "./stage_1" --model bloom --strategy naive --loss_fn log_exp --save_path stage_2.pt '
    "--test True --lora_rank 16"
)
PROMPTS = "python generate_prompt_dataset.py --dataset_path instinwild_en.json --save_path prompt_samples_100.csv --sample_size 100"
PPO = (
    "nohup torchrun --standalone --nproc_per_node=1 train_prompts.py --prompt_dataset prompt_samples_100.csv "
    "--pretrain_dataset data/instinwild_en.json --strategy naive --model bloom --pretrain ./stage_1 --rm_model bloom --rm_path stage_2.pt "
    "--train_batch_size 1 --max_epochs 1 --lora_rank 16 --save_path stage_3 > ppo.log 2>&1 &"
)
NODES = (
    "OMP_NUM_THREADS=8 WORLD_SIZE=6 CUDA_VISIBLE_DEVICES=0,1,2,3,4,5 torchrun --nproc_per_node=6 --nnodes=3 --node_rank=0 \\\n"
    " --master_addr=10.0.0.1 --master_port=29500 train_prompts.py \\\n --prompt_dataset Belle_open_source_0.5M.json "
    "--strategy colossalai_gemini --model llama --pretrain /models/llama-7b-hf --train_batch_size 1 --max_epochs 1 --lora_rank 2"
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(command: str, folder: Path) -> Cell:
    """The one cell of the command's suite, read from the file as anybody would."""
    (folder / "suite.yaml").write_text(suite_from_command(command).yaml(command), encoding="utf-8")
    plan = make_plan(folder / "suite.yaml")
    (cell,) = plan.cells.values()
    return cell


def told(command: str) -> dict[str, str]:
    return dict(suite_from_command(command).dropped)


# -- the seed's five commands ----------------------------------------------------------------------------------------

GOLDEN: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    "sft": (
        SFT,
        {"stage": "sft", "model": "bloom-560m", "strategy": "naive", "lora_rank": 16, "nodes": 1, "processes_per_node": 1},
        {"data": "instructwild-en", "rows": 576, "held_out_rows": 64, "epochs": 1, "micro_batch": 1, "global_batch": 8,
         "learning_rate": 2e-5, "weights": "pretrained", "clip_norm": None, "optimizer": "adamw", "schedule": "cosine",
         "warmup_share": 0.03},
        ["--max_len (not given)", "--save_path stage_1", "precision", "semantics"],
    ),
    "rm": (
        RM,
        {"stage": "rm", "model": "bloom-560m", "strategy": "naive", "lora_rank": 16},
        {"data": "rm-static", "rows": 110, "held_out_rows": 10, "epochs": 1, "global_batch": 1, "loss": "log_exp", "learning_rate": 5e-6,
         "sequence_length": 512, "warm_start": "shared"},
        ["--pretrain ./stage_1", "--save_path stage_2.pt", "--test", "precision", "schedule", "semantics"],
    ),
    "ppo": (
        PPO,
        {"stage": "ppo", "model": "bloom-560m", "strategy": "naive", "lora_rank": 16},
        {"data": "synthetic-prompts", "iterations": 10, "prompts_per_iteration": 10, "global_batch": 1, "prompt_length": 96,
         "response_length": 32, "top_k": 50, "ppo_epochs": 1, "kl_coef": 0.1, "ptx": "instructwild-en", "ptx_coef": 0.9,
         "schedule": "constant", "learning_rate": 1e-7, "reward_model": "trained", "warm_start": "shared"},
        ["--pretrain ./stage_1", "--prompt_dataset", "--prompt_path prompt_samples_100.csv", "--rm_model bloom", "--rm_path stage_2.pt",
         "--save_path stage_3", "nohup", "precision", "semantics"],
    ),
    "three nodes": (
        NODES,
        {"stage": "ppo", "model": "llama-7b", "strategy": "gemini", "lora_rank": 2, "nodes": 3, "processes_per_node": 6},
        {"data": "belle-0.5m", "iterations": 10, "prompts_per_iteration": 180, "global_batch": 18, "micro_batch": 1, "optimizer": "hybrid",
         "activation_checkpointing": True, "reward_model": "fresh-head", "ptx": "none", "ptx_coef": 0.0, "warm_start": "none"},
        ["--master_addr 10.0.0.1", "--master_port 29500", "--node_rank 0", "--prompt_dataset", "--ptx_coef 0.9", "--rm_path (not given)",
         "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5", "OMP_NUM_THREADS=8", "WORLD_SIZE=6", "precision", "semantics"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_a_command_of_the_seed_becomes_a_suite_with_its_numbers(name: str, tmp_path: Path) -> None:
    command, axes, settings, dropped = GOLDEN[name]
    cell = planned(command, tmp_path)
    assert {axis: getattr(cell, axis) for axis in axes} == axes
    assert {key: getattr(cell.settings, key) for key in settings} == settings
    assert sorted(told(command)) == dropped


def test_the_seeds_reference_suites_have_the_same_numbers(tmp_path: Path) -> None:
    """config/reference was written by hand from the same commands."""
    root = Path(__file__).parents[2] / "config" / "reference"
    for name, file in (
        ("sft", "bloom-560m-pretrained"),
        ("rm", "bloom-560m-pretrained"),
        ("ppo", "bloom-560m-pretrained"),
        ("three nodes", "llama-7b-3x6"),
    ):
        cell = planned(GOLDEN[name][0], tmp_path)
        content = yaml.safe_load((root / f"{file}.yaml").read_text(encoding="utf-8"))
        stage = content["stages"][cell.stage]
        different = {key for key, value in stage.items() if json.loads(json.dumps(getattr(cell.settings, key))) != _number(value)}
        assert different <= ({"data"} if name == "ppo" else set()), (name, different)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+e-\d+", value) else value


def test_the_prompt_drawing_is_no_suite_and_names_the_verb_that_does_it() -> None:
    with pytest.raises(UserError, match=r"trains nothing.*coati-bench data prompts INPUT OUTPUT --count N"):
        suite_from_command(PROMPTS)


# -- launchers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "shape"),
    [
        ("python", (1, 1)),
        ("/usr/bin/python3.9", (1, 1)),
        ("torchrun --nproc_per_node 4", (1, 4)),
        ("torchrun --nnodes=2 --nproc-per-node=4 --rdzv_backend c10d --rdzv_endpoint host:1", (2, 4)),
        ("python -m torch.distributed.run --nproc_per_node=2", (1, 2)),
        ("python -m torch.distributed.launch --nproc_per_node=2 --use_env", (1, 2)),
        ("colossalai run --nproc_per_node 3 --hostfile hosts", (1, 3)),
        ("CUDA_VISIBLE_DEVICES=4,5 torchrun --nproc_per_node=gpu", (1, 2)),
        ("env A=1 nohup torchrun --nnodes=1:3 --nproc_per_node=2", (3, 2)),
        ("cd examples && torchrun --nproc_per_node=2", (1, 2)),
        ("#!/bin/bash\n# two GPUs; as in the README\nexport OMP_NUM_THREADS=8  # or more\ntorchrun --nproc_per_node=2 \\\r\n", (1, 2)),
    ],
)
def test_any_launcher_gives_nodes_and_processes(launcher: str, shape: tuple[int, int]) -> None:
    command = read_command(f"{launcher} train_sft.py --strategy ddp --batch_size=2")
    assert (command.nodes, command.processes) == shape
    assert command.values["batch_size"] == 2


def test_variables_that_a_script_sets_are_filled_in(tmp_path: Path) -> None:
    script = (
        'BASE=bigscience/bloom-560m\nexport GPUS=4\ntorchrun --nproc_per_node=$GPUS train_sft.py --strategy ddp --pretrain "${BASE}" '
        "--save_path $OUT"
    )
    cell = planned(script, tmp_path)
    assert (cell.model, cell.world_size, cell.settings.weights) == ("bloom-560m", 4, "pretrained")
    assert "--save_path $OUT" in told(script)


def test_naive_on_many_processes_is_one_process_and_told(tmp_path: Path) -> None:
    command = "torchrun --nproc_per_node=4 train_sft.py --strategy naive --pretrain bigscience/bloom-560m"
    assert planned(command, tmp_path).world_size == 1
    assert "never communicated" in told(command)["4 processes"]


def test_the_batches_of_all_ranks_and_micro_steps_make_the_global_batch(tmp_path: Path) -> None:
    cell = planned("torchrun --nnodes 2 --nproc_per_node 4 train_sft.py --strategy ddp --batch_size 3 --accimulation_steps 5", tmp_path)
    assert (cell.settings.micro_batch, cell.accumulation, cell.settings.global_batch) == (3, 5, 120)


# -- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", STRATEGIES)
def test_every_old_strategy_has_its_name_of_today(old: str, tmp_path: Path) -> None:
    assert planned(f"torchrun --nproc_per_node 1 train_sft.py --strategy {old}", tmp_path).strategy == STRATEGIES[old]


@pytest.mark.parametrize(
    ("written", "meant"),
    [("--accumulation_steps 3", "accimulation_steps"), ("--accimulation-steps=3", "accimulation_steps"),
     ("--accim 3", "accimulation_steps"), ("--acumulation_steps 3", "accimulation_steps"),
     ("--bach_size 3", "batch_size"), ("--max_epoch 3", "max_epochs")],
)  # fmt: skip
def test_a_misspelt_flag_is_read_as_what_was_meant_and_told(written: str, meant: str) -> None:
    command = read_command(f"python train_sft.py {written}")
    assert command.values[meant] == 3
    assert (written.partition(" ")[0].partition("=")[0], f"read as --{meant}") in command.dropped


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_a_script_changes_the_suite_or_is_told(script: str, tmp_path: Path) -> None:
    stage, flags = SCRIPTS[script]
    values = {int: "2", float: "0.25", bool: "True", str: "word"}
    special = {"strategy": "colossalai_zero2", "model": "opt", "pretrain": "facebook/opt-125m", "loss_fn": "log_exp",
               "dataset": "Anthropic/hh-rlhf", "rm_model": "gpt2", "kl_coef": "0.3",
               "ptx_coef": "0.25", "update_timesteps": "5"}  # fmt: skip
    rest = " --pretrain_dataset p.json" if stage == "ppo" else ""
    before = suite_from_command(f"python {script}{rest}")
    for name, flag in flags.items():
        word = "" if flag.switch else special.get(name, values[flag.kind])
        after = suite_from_command(f"python {script}{'' if name == 'pretrain_dataset' else rest} --{name} {word}")
        changed = {**after.content, "suite": ""} != {**before.content, "suite": ""}
        assert changed or any(name in item.what for item in after.dropped), name
        assert (name in UNUSED) <= any(item.what.startswith(f"--{name}") for item in after.dropped), name


def test_an_unknown_flag_is_told_and_changes_nothing() -> None:
    with_it, without = suite_from_command(f"{SFT} --flash_attention yes"), suite_from_command(SFT)
    assert with_it.content == without.content
    assert dict(with_it.dropped)["--flash_attention yes"] == "no flag of train_sft.py at v0.2.8"


def test_false_after_a_bool_flag_was_true_and_is_told() -> None:
    dropped = told(f"{SFT} --need_optim_ckpt False --log_interval 10")
    assert "any word after the flag was taken for true" in dropped["--need_optim_ckpt True"]
    assert "never used it" in dropped["--log_interval 10"]


def test_the_users_own_files_and_folders_are_taken_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps([{"instruction": f"say {n}", "input": "", "output": f"{n}"} for n in range(100)]))
    (tmp_path / "stage_1").mkdir()
    (tmp_path / "stage_1" / "config.json").write_text(
        json.dumps({"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "vocab_size": 4096})
    )
    cell = planned("python train_sft.py --strategy naive --dataset mine.json --pretrain ./stage_1", tmp_path)
    assert (cell.settings.data, cell.model, cell.settings.weights) == (
        f"file:{tmp_path}/mine.json",
        str(tmp_path / "stage_1"),
        "pretrained",
    )


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ls -l", "no command of coati"),
        ("", "no command of coati"),
        ("python train_sft.py --pretrain 'unfinished", "cannot be read"),
        ("python train_sft.py && python train_reward_model.py", "2 command of coati"),
        (
            "python train_sft.py --lora_rank many --lr fast",
            r"--lora_rank: not a whole number; seen: 'many'; --lr: not a number; seen: 'fast'",
        ),
        ("python train_sft.py --strategy tpu", "no strategy is called so"),
        ("python train_reward_model.py --model deberta", "no such architecture here"),
        ("torchrun --nnodes many train_sft.py", "no number of nodes"),
    ],
)
def test_what_is_no_command_of_coati_is_refused_in_words(command: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        suite_from_command(command)


def test_numbers_that_make_no_suite_are_told_with_their_place() -> None:
    with pytest.raises(UserError, match=r"the suite of this command: .*\n.*lora_rank"):
        write_suite("python train_sft.py --lora_rank=-1", None)


def test_the_verb_writes_the_suite_and_tells_the_rest_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "suite.yaml"
    assert _exit_code(["suite", "from-command", SFT, "--output", str(target)]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "--save_path stage_1: weights go where" in printed.err
    assert target.read_text(encoding="utf-8").startswith("# Made by `coati-bench suite from-command` from\n# torchrun --standalone")
    assert len(make_plan(target).cells) == 1
    assert _exit_code(["suite", "from-command", SFT, "--output", str(target)]) == 2
    assert _exit_code(["suite", "from-command", SFT]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["suite"] == "coati-sft-bloom-560m-naive"


def test_reading_a_command_loads_no_torch() -> None:
    code = f"import sys; from bench.from_command import write_suite; write_suite({SFT!r}, None); sys.exit('torch' in sys.modules)"
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_full_disk_leaves_no_half_of_a_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: str) -> None:
        path.write_text(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "new" / "suite.yaml"
    with monkeypatch.context() as patched:
        patched.setattr("bench.files._write", full)
        with pytest.raises(MachineError, match="cannot be written; seen: No space left on device"):
            write_suite(SFT, output)
    assert not list(output.parent.iterdir())
    write_suite(SFT, output)
    assert [path.name for path in output.parent.iterdir()] == ["suite.yaml"]
