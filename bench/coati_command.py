"""Command lines of ColossalAI-Chat v0.2.8 (and of the releases around it), read word by word. Torch-free.

What argparse and torchrun of that time took is taken: underscores, unique beginnings, `--flag=value`. Spellings of neighbouring
releases and likely slips of the pen are read as what was meant, and told. Sources of the flags: applications/Chat/examples/train_sft.py,
train_reward_model.py and train_prompts.py at tag v0.2.8.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

from bench.errors import UserError


class Flag(NamedTuple):
    """One flag of a script."""

    kind: type
    """str, int, float, or bool: true for any word, `False` too."""
    default: Any = None
    switch: bool = False
    """Takes no value."""


_COMMON = {
    "strategy": Flag(str, "naive"), "model": Flag(str, "bloom"), "pretrain": Flag(str), "save_path": Flag(str),
    "need_optim_ckpt": Flag(bool, False), "lora_rank": Flag(int, 0),
    # of later releases
    "use_wandb": Flag(bool, False, switch=True), "grad_checkpoint": Flag(bool, False, switch=True),
}  # fmt: skip

SCRIPTS: dict[str, tuple[str, dict[str, Flag]]] = {
    "train_sft.py": ("sft", {
        **_COMMON, "dataset": Flag(str), "max_datasets_size": Flag(int), "max_epochs": Flag(int, 3), "batch_size": Flag(int, 4),
        "lr": Flag(float, 5e-6), "accimulation_steps": Flag(int, 8), "log_interval": Flag(int, 100), "max_len": Flag(int),
    }),
    "train_reward_model.py": ("rm", {
        **_COMMON, "model_path": Flag(str), "dataset": Flag(str, "Dahoas/rm-static"), "subset": Flag(str), "max_epochs": Flag(int, 1),
        "batch_size": Flag(int, 1), "loss_fn": Flag(str, "log_sig"), "test": Flag(bool, False), "max_len": Flag(int),
    }),
    "train_prompts.py": ("ppo", {
        **_COMMON, "model": Flag(str, "gpt2"), "prompt_path": Flag(str), "pretrain_dataset": Flag(str), "rm_model": Flag(str),
        "rm_path": Flag(str), "rm_pretrain": Flag(str), "num_episodes": Flag(int, 10), "max_timesteps": Flag(int, 10),
        "update_timesteps": Flag(int, 10), "max_epochs": Flag(int, 5), "train_batch_size": Flag(int, 8), "ptx_batch_size": Flag(int, 1),
        "experience_batch_size": Flag(int, 8), "kl_coef": Flag(float, 0.1), "ptx_coef": Flag(float, 0.9),
    }),
}  # fmt: skip
"""Script -> its stage and its flags."""

_ALIASES = {"accumulation_steps": "accimulation_steps", "prompt_dataset": "prompt_path", "loss_func": "loss_fn"}
"""Spellings of other releases and of upstream's README -> that of v0.2.8."""

_WRAPPERS = frozenset({"nohup", "env", "time", "exec", "nice", "sudo", "stdbuf"})
_LAUNCHERS = frozenset({"torch.distributed.run", "torch.distributed.launch"})
_SWITCHES = frozenset({"standalone", "use_env", "no_python"})
"""Flags of torchrun without a value."""
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


class Dropped(NamedTuple):
    """Something of the command that the suite does not have."""

    what: str
    why: str


@dataclass(slots=True)
class Command:
    """A command, understood."""

    script: str = ""
    stage: str = ""
    nodes: int = 1
    processes: int = 1
    values: dict[str, Any] = field(default_factory=dict)
    """Flag -> value, defaults of v0.2.8 filled in."""
    given: set[str] = field(default_factory=set)
    """Flags that the command names."""
    dropped: list[Dropped] = field(default_factory=list)
    devices: int | None = None
    """How many CUDA_VISIBLE_DEVICES names."""


def read_command(text: str) -> Command:
    """Understand one command. Raises UserError, with every mistake, if it is none of coati's."""
    words = _one_command(text)
    place = next(index for index, word in enumerate(words) if PurePath(word).name in SCRIPTS)
    command = Command(script=PurePath(words[place]).name)
    command.stage, flags = SCRIPTS[command.script]
    _read_launcher(words[:place], command)
    mistakes = _read_flags(words[place + 1 :], flags, command)
    if mistakes:
        raise UserError(f"{command.script}: " + "; ".join(mistakes))
    command.values = {**{name: flag.default for name, flag in flags.items()}, **command.values}
    return command


def _one_command(text: str) -> list[str]:
    """The words of the one command of coati in a line or script; redirections, `cd` and the like fall away."""
    try:
        words = [word for line in re.sub(r"\\\r?\n", " ", text).splitlines() for word in (*_words(line), ";")]
    except ValueError as error:
        raise UserError(
            f"the command cannot be read: {error}; seen: {text[:80]!r}; whole words with paired quotes would be right"
        ) from None
    parts = _parts(words)
    found = [part for part in parts if any(PurePath(word).name in SCRIPTS for word in part)]
    if len(found) == 1:
        return [_filled(word, _variables(parts)) for word in found[0]]
    if any(PurePath(word).name == "generate_prompt_dataset.py" for word in words):
        raise UserError(
            "generate_prompt_dataset.py trains nothing, so it is no suite; "
            "`coati-bench data prompts INPUT OUTPUT --count N --seed 42` draws the same number of prompts"
        )
    raise UserError(
        f"{len(found) or 'no'} command of coati; seen: {text[:80]!r}; one with {', '.join(SCRIPTS)} would be right, one at a time"
    )


def _words(line: str) -> list[str]:
    """The words of one line as a shell splits them, comments left out. Raises ValueError for quotes without a pair."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def _parts(words: Sequence[str]) -> list[list[str]]:
    """Commands between `;`, `&&`, `|` and `&`, without redirections."""
    parts: list[list[str]] = [[]]
    skip = False
    for word in words:
        if skip:
            skip = False
        elif set(word) <= set("<>&|;()") and word:
            if set(word) & set("<>"):
                skip = True
                if parts[-1] and parts[-1][-1] in ("1", "2"):
                    parts[-1].pop()
            else:
                parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _variables(parts: Sequence[Sequence[str]]) -> dict[str, str]:
    """What a script's own lines set: `NAME=value`, `export NAME=value`."""
    lines = [[word for word in part if word != "export"] for part in parts]
    found = [_ASSIGNMENT.fullmatch(word) for line in lines for word in line if all(map(_ASSIGNMENT.fullmatch, line))]
    return {item[1]: item[2] for item in found if item}


def _filled(word: str, variables: dict[str, str]) -> str:
    """`word` with the variables that are known in it; others stay as they are written."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: variables.get(found[1] or found[2], found[0]), word)


# -- before the script -----------------------------------------------------------------------------------------------


def _read_launcher(words: list[str], command: Command) -> None:
    """Environment, wrappers, and torchrun or python."""
    rest = list(words)
    while rest and (rest[0] in _WRAPPERS or _ASSIGNMENT.fullmatch(rest[0])):
        word = rest.pop(0)
        if found := _ASSIGNMENT.fullmatch(word):
            _read_variable(found[1], found[2], command)
        elif word == "nohup":
            command.dropped.append(Dropped("nohup", "a run is resumed by running it again; logs lie in results/SUITE/logs"))
    program = PurePath(rest[0]).name if rest else ""
    if program == "torchrun" or program == "colossalai" or _LAUNCHERS & set(rest):
        _read_torchrun([word for word in rest[1:] if word not in (*_LAUNCHERS, "-m", "run")], command)
    elif rest and not program.startswith("python"):
        command.dropped.append(Dropped(" ".join(rest), "no launcher that is known here; taken for one process"))


def _read_variable(name: str, value: str, command: Command) -> None:
    if name == "CUDA_VISIBLE_DEVICES":
        command.devices = len([item for item in value.split(",") if item.strip()])
        why = "devices are taken from a pool when they are idle; set it around `coati-bench run` to leave some out"
    elif name == "WORLD_SIZE":
        why = "torchrun overwrites it with nodes x processes"
    else:
        why = "an environment variable is no part of a suite; set it around `coati-bench run`"
    command.dropped.append(Dropped(f"{name}={value}", why))


def _read_torchrun(words: list[str], command: Command) -> None:
    place = 0
    while place < len(words):
        name, mark, value = words[place].lstrip("-").partition("=")
        name = name.replace("-", "_")
        place += 1
        if name in _SWITCHES or not words[place - 1].startswith("-"):
            continue
        if not mark and place < len(words):
            value = words[place]
            place += 1
        if name == "nproc_per_node":
            command.processes = _processes(value, command)
        elif name == "nnodes":
            command.nodes = _nodes(value, command)
        else:
            command.dropped.append(Dropped(f"--{name} {value}", "the launcher chooses it itself"))


def _processes(value: str, command: Command) -> int:
    if value.isdigit() and int(value) > 0:
        return int(value)
    seen = command.devices or 1
    command.dropped.append(Dropped(f"--nproc_per_node {value}", f"a suite names a number; {seen} was taken"))
    return seen


def _nodes(value: str, command: Command) -> int:
    numbers = [int(number) for number in value.split(":") if number.isdigit() and int(number) > 0]
    if not numbers:
        raise UserError(f"--nnodes {value}: no number of nodes; a whole number would be right")
    if len(numbers) > 1:
        command.dropped.append(Dropped(f"--nnodes {value}", f"nodes do not come and go during a trial; {numbers[-1]} were taken"))
    return numbers[-1]


# -- behind the script -----------------------------------------------------------------------------------------------


def _read_flags(words: Sequence[str], flags: dict[str, Flag], command: Command) -> list[str]:
    """Fill in the command's values; return what cannot be read at all."""
    mistakes, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            command.dropped.append(Dropped(word, f"{command.script} takes no words of its own"))
            continue
        written, mark, value = word[2:].partition("=")
        name = _meant(written, flags)
        flag = flags[name] if name else Flag(str)
        if not mark and not flag.switch:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else ""
        if name is None:
            command.dropped.append(Dropped(f"--{written} {value}".rstrip(), f"no flag of {command.script} at v0.2.8"))
            continue
        if name != written:
            command.dropped.append(Dropped(f"--{written}", f"read as --{name}"))
        try:
            command.values[name] = _value(flag, value)
            command.given.add(name)
        except ValueError:
            mistakes.append(f"--{name}: not {'a whole number' if flag.kind is int else 'a number'}; seen: {value!r}")
    return mistakes


def _meant(written: str, flags: dict[str, Flag]) -> str | None:
    """The flag that is meant: itself, another release's spelling, a unique beginning (argparse takes those), a near miss."""
    plain = written.replace("-", "_").lower()
    plain = _ALIASES.get(plain, plain)
    if plain in flags:
        return plain
    begun = [name for name in flags if name.startswith(plain)]
    if plain and len(begun) == 1:
        return begun[0]
    near = difflib.get_close_matches(plain, [*flags, *(alias for alias, name in _ALIASES.items() if name in flags)], n=1, cutoff=0.8)
    return _ALIASES.get(near[0], near[0]) if near else None


def _value(flag: Flag, text: str) -> Any:
    if flag.kind is bool:
        return flag.switch or text != ""
    if not text and flag.kind is not str:
        raise ValueError(text)
    return flag.kind(text)
