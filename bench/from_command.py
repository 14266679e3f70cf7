"""A suite out of an old command line: what `coati-bench suite from-command` does. Torch-free.

The numbers of the command become axes and settings; what has no place in a suite is told with the reason, never dropped in silence.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bench.coati_command import Command, Dropped, read_command
from bench.data.sources import data_problem
from bench.errors import SuiteError, UserError
from bench.files import write_whole
from bench.matrix import make_plan
from bench.models.presets import PRESETS
from bench.strategies.base import all_strategies

STRATEGIES = {
    "naive": "naive", "ddp": "ddp", "colossalai_gemini": "gemini", "colossalai_zero2": "zero2", "colossalai_zero2_cpu": "zero2_cpu",
    "colossalai_gemini_cpu": "gemini_cpu", "colossalai_zero1": "zero1", "colossalai_zero1_cpu": "zero1_cpu",
}  # fmt: skip
"""Strategy of v0.2.8 -> that of today."""

_DEFAULT_MODEL = {"bloom": "bloom-560m", "gpt2": "gpt2-s", "opt": "opt-125m", "llama": "llama-7b"}
_BUILT = {"bloom": "bloom-tiny", "gpt2": "gpt2-s", "opt": "opt-125m", "llama": "llama-7b"}
"""What transformers' default configuration, which v0.2.8 built without --pretrain, is nearest to."""

_DATA = {
    "instinwild_en.json": "instructwild-en", "instinwild_ch.json": "instructwild-ch", "belle_open_source_0.5m.json": "belle-0.5m",
    "dahoas/rm-static": "rm-static", "rm-static": "rm-static", "anthropic/hh-rlhf": "hh-rlhf",
}  # fmt: skip
"""File or hub name, in small letters -> name of the source table."""
_SYNTHETIC = {"sft": "synthetic-instruct", "rm": "synthetic-pairs", "ppo": "synthetic-prompts"}

_HELD_OUT = 64
_STAGE_1 = {"data": "synthetic-instruct", "steps": 64, "global_batch": 8, "learning_rate": 2e-5}
_STAGE_2 = {"data": "synthetic-pairs", "steps": 64, "global_batch": 8, "learning_rate": 5e-6}
"""Stand for the commands of earlier stages, of which this command says nothing."""

UNUSED = {
    "save_path": "weights go where later stages find them: results/SUITE/warm (`warm_start: chain` keeps those of a cell)",
    "need_optim_ckpt": "`save_every` saves the training state, so that a stopped trial goes on; any word after the flag was taken for true",
    "log_interval": "v0.2.8 took it and never used it; every step's loss is in the record",
    "use_wandb": "every value is in the record, and the report is made from records",
    "experience_batch_size": "v0.2.8 took it and never used it",
    "rm_model": "reward model and critic have the policy's architecture here",
    "rm_pretrain": "reward model and critic have the policy's architecture here",
}
"""Flag -> why no suite has it."""


class Carried(NamedTuple):
    """A suite, and what it could not carry over."""

    content: dict[str, Any]
    dropped: list[Dropped]

    def yaml(self, command: str) -> str:
        """The suite as a file, with the command above it."""
        head = "".join(f"# {line.strip()}\n" for line in command.strip().splitlines())
        return f"# Made by `coati-bench suite from-command` from\n{head}" + yaml.safe_dump(
            self.content, sort_keys=False, default_flow_style=None, width=120
        )


@dataclass(slots=True)
class _Draft:
    """A suite in the making."""

    command: Command
    settings: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of the stages that the command's own begins from."""

    def drop(self, what: str, why: str) -> None:
        self.command.dropped.append(Dropped(what, why))

    def __getitem__(self, flag: str) -> Any:
        return self.command.values[flag]

    @property
    def ranks(self) -> int:
        return self.command.nodes * self.command.processes


def suite_from_command(text: str) -> Carried:
    """The suite that stands for a command of v0.2.8. Raises UserError for what cannot be one."""
    draft = _Draft(read_command(text))
    command = draft.command
    strategy, model = _strategy(draft), _model(draft)
    if strategy == "naive" and draft.ranks > 1:
        draft.drop(f"{draft.ranks} processes", "naive of v0.2.8 never communicated: so many copies of one run; one process was taken")
        command.nodes = command.processes = 1
    draft.settings |= {"device": "cuda", "precision": "bf16-master", "clip_norm": None}
    draft.settings["optimizer"] = "adamw" if strategy in ("naive", "ddp") else "hybrid"
    if draft["grad_checkpoint"] or draft["model"] == "llama":
        draft.settings["activation_checkpointing"] = True
    _STAGES[command.stage](draft)
    for flag in sorted(command.given & UNUSED.keys()):
        draft.drop(f"--{flag} {draft[flag]}", UNUSED[flag])
    draft.drop("precision", _precision_note(command.stage, strategy))
    draft.drop("semantics", "sound arithmetic is the default; `semantics: coati-0.2.8` restores what that release computed otherwise")
    axes = {"stage": [command.stage], "model": [model], "strategy": [strategy], "lora_rank": [draft["lora_rank"]],
            "nodes": [command.nodes], "processes_per_node": [command.processes]}  # fmt: skip
    name = re.sub(r"[^a-z0-9._-]+", "-", f"coati-{command.stage}-{Path(model).name}-{strategy}".lower())[:64]
    content = {
        "suite": name, "description": f"{command.script} of ColossalAI-Chat v0.2.8", "axes": axes, "settings": draft.settings,
        "stages": {**draft.earlier, command.stage: draft.stage},
    }  # fmt: skip
    return Carried(content, command.dropped)


def _precision_note(stage: str, strategy: str) -> str:
    was = (
        "fp16 without master weights"
        if stage != "sft" and strategy in ("naive", "ddp")
        else "fp32"
        if strategy in ("naive", "ddp")
        else "fp16"
    )
    return f"v0.2.8 ran this in {was}; the suite says bf16-master, which every strategy offers; `precision` changes it"


# -- axes ------------------------------------------------------------------------------------------------------------


def _strategy(draft: _Draft) -> str:
    name, known = str(draft["strategy"]), all_strategies()
    strategy = STRATEGIES.get(name) or STRATEGIES.get(f"colossalai_{name}") or name
    if strategy not in known:
        raise UserError(
            f"--strategy {name}: no strategy is called so; one of {', '.join(STRATEGIES)} (or {', '.join(known)}) would be right"
        )
    return strategy


def _model(draft: _Draft) -> str:
    """Preset, folder or hub id; also says where the weights come from."""
    family, given = str(draft["model"]), draft["pretrain"]
    if family not in _DEFAULT_MODEL:
        raise UserError(f"--model {family}: no such architecture here; seen: {family!r}; one of {', '.join(_DEFAULT_MODEL)} would be right")
    draft.settings["weights"] = "random"
    if not given:
        draft.drop(
            "--pretrain (not given)", f"v0.2.8 built the default configuration; {_BUILT[family]} with random weights is nearest to it"
        )
        return _BUILT[family]
    if (folder := Path(given).expanduser()).is_dir() and (folder / "config.json").is_file():
        draft.settings["weights"] = "pretrained"
        return str(folder.absolute())
    if preset := _preset(family, given):
        draft.settings["weights"] = "pretrained" if PRESETS[preset].hub_id else "random"
        if PRESETS[preset].hub_id is None:
            draft.drop(f"--pretrain {given}", f"no published weights have the shape of {preset}; its weights are random")
        return preset
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", given) and family in given.lower():
        draft.settings["weights"] = "pretrained"
        return str(given)
    model = _DEFAULT_MODEL[family]
    draft.settings["weights"] = "pretrained"
    draft.drop(
        f"--pretrain {given}", f"no such folder is here; taken for what an earlier stage makes of {model}: change axes.model if it is not"
    )
    if draft.command.stage != "sft":
        draft.earlier["sft"] = dict(_STAGE_1)
    return model


def _preset(family: str, given: str) -> str | None:
    """The preset that a hub id or a folder's name means."""
    wanted = Path(given.rstrip("/")).name.lower().removesuffix("-hf")
    for name, preset in PRESETS.items():
        hub = (preset.hub_id or "").rpartition("/")[2].lower()
        if name.partition("-")[0] == family and wanted in (name, hub):
            return name
    return None


# -- stages ----------------------------------------------------------------------------------------------------------


def _data(draft: _Draft, flag: str, kind: str) -> str:
    """Data by its file's or hub's name, the user's file, or a generated set of the same shape."""
    given = str(draft[flag] or "")
    for name in (given.lower(), Path(given).name.lower()):
        if name in _DATA:
            return _DATA[name]
    if given and Path(given).is_file() and data_problem(name := f"file:{Path(given).absolute()}", Path()) is None:
        return name
    why = f"there is no such file here; {kind} has the same shape, and `file:PATH` takes yours"
    draft.drop(f"--{flag} {given}" if given else f"--{flag} (not given)", why if given else f"{kind} was taken")
    return kind


def _sft(draft: _Draft) -> None:
    batch, steps = draft["batch_size"], draft["accimulation_steps"]
    rows = draft["max_datasets_size"]
    draft.stage |= {
        "data": _data(draft, "dataset", _SYNTHETIC["sft"]),
        **({} if rows is None else {"rows": rows + _HELD_OUT, "held_out_rows": _HELD_OUT}),
        "epochs": draft["max_epochs"], "micro_batch": batch, "global_batch": batch * steps * draft.ranks,
        "sequence_length": draft["max_len"] or 512, "learning_rate": draft["lr"],
    }  # fmt: skip
    if draft["max_len"] is None:
        draft.drop("--max_len (not given)", "v0.2.8 cut at the tokenizer's model_max_length, which BLOOM's lacks; 512 was taken")


def _rm(draft: _Draft) -> None:
    batch = draft["batch_size"]
    test = {"rows": 110, "held_out_rows": 10} if draft["test"] else {}
    draft.stage |= {
        "data": _data(draft, "dataset", _SYNTHETIC["rm"]), **test, "epochs": draft["max_epochs"], "micro_batch": batch,
        "global_batch": batch * draft.ranks, "sequence_length": draft["max_len"] or 512, "loss": draft["loss_fn"], "learning_rate": 5e-6,
        "warm_start": "shared" if draft.earlier else "none",
    }  # fmt: skip
    if "test" in draft.command.given:
        draft.drop("--test", "any word after it was taken for true: 100 rows to train on; 10 of the same data are held out here")
    if draft["subset"]:
        draft.drop(f"--subset {draft['subset']}", f"`data: hh-rlhf-{draft['subset']}` names a part of it, if `data list` has it")
    if draft["model_path"]:
        draft.drop(f"--model_path {draft['model_path']}", "a reward model begins with a fresh head here")
    draft.drop(
        "schedule", "v0.2.8 stepped a cosine every 100 batches and let it rise again after an epoch; the suite says cosine over all steps"
    )


def _ppo(draft: _Draft) -> None:
    batch, every = draft["train_batch_size"], draft["update_timesteps"]
    iterations = draft["num_episodes"] * draft["max_timesteps"] // every
    if iterations < 1:
        draft.drop(f"--update_timesteps {every}", "more than there are timesteps: v0.2.8 would never have learned; one iteration was taken")
    ptx = draft["pretrain_dataset"] and draft["ptx_coef"] > 0
    draft.stage |= {
        "data": _data(draft, "prompt_path", _SYNTHETIC["ppo"]), "iterations": max(1, iterations),
        "prompts_per_iteration": every * batch * draft.ranks, "global_batch": batch * draft.ranks, "micro_batch": batch,
        "prompt_length": 96, "response_length": 32, "top_k": 50, "ppo_epochs": draft["max_epochs"], "kl_coef": draft["kl_coef"],
        "schedule": "constant", "learning_rate": 1e-7,
    }  # fmt: skip
    if ptx:
        draft.stage |= {"ptx": _data(draft, "pretrain_dataset", _SYNTHETIC["sft"]), "ptx_coef": draft["ptx_coef"]}
        if draft["ptx_batch_size"] != batch:
            draft.drop(f"--ptx_batch_size {draft['ptx_batch_size']}", f"the ptx loss has as many rows as PPO has sequences: {batch} a rank")
    elif draft["ptx_coef"] > 0:
        draft.drop(f"--ptx_coef {draft['ptx_coef']}", "without --pretrain_dataset there is nothing to mix in (v0.2.8 would have crashed)")
    _reward_model(draft)


def _reward_model(draft: _Draft) -> None:
    given = draft["rm_path"]
    if given and (Path(given) / "config.json").is_file():
        draft.stage["reward_model"] = str(Path(given).absolute())
    elif given:
        draft.earlier = {"sft": dict(_STAGE_1), "rm": dict(_STAGE_2), **draft.earlier}
        why = f"a suite trains its own, or takes a folder: `coati-bench checkpoint convert {given} FOLDER`, then `reward_model: FOLDER`"
        draft.drop(f"--rm_path {given}", why)
    else:
        draft.stage["reward_model"] = "fresh-head"
        draft.drop("--rm_path (not given)", "the reward model's head is untrained: right for timing, meaningless for the reward")
    draft.stage["warm_start"] = "shared" if draft.earlier else "none"


_STAGES: dict[str, Callable[[_Draft], None]] = {"sft": _sft, "rm": _rm, "ppo": _ppo}


# -- for people ------------------------------------------------------------------------------------------------------


def dropped_text(carried: Carried) -> str:
    """What could not be carried over, a line each."""
    lines = [f"  {item.what}: {item.why}" for item in carried.dropped]
    return "\n".join(["not carried over, or read in another way:", *lines]) if lines else "everything was carried over"


def write_suite(text: str, output: Path | None) -> None:
    """Write the suite of a command to `output` (else print it), and tell what was dropped and what the plan skips on standard error.

    Raises UserError if the command is none of coati's, if `output` is there, or if the suite could not be planned.
    """
    if output is not None and output.exists():
        raise UserError(f"{output}: there is something already; nothing is overwritten, so name a path that does not exist")
    carried = suite_from_command(text)
    content = carried.yaml(text)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "suite.yaml"
        draft.write_text(content, encoding="utf-8")
        try:
            plan = make_plan(draft)
        except SuiteError as error:
            raise SuiteError("the suite of this command", error.mistakes) from None
    if output is None:
        print(content, end="")
    else:
        write_whole({output: content})
    print(dropped_text(carried), file=sys.stderr)
    for skipped in plan.skipped:
        print(f"the plan skips {skipped.cell.cell_id}: {skipped.reason}", file=sys.stderr)
