"""Random initial weights, the same numbers sooner: most of the time that a trial needs to load is spent on drawing them.

A framework fills a model twice, layer by layer, from one serial generator. The first time on a machine that is done as it
is, and the generator's state before every fill is noted in the user's cache. From then on the fills whose values are overwritten
later are left out, and the others run side by side, each from its own state: the values are the same, bit by bit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from bench.cell import digest
from bench.layout import cache_folder

PIECE = 1 << 24
"""Elements that are filled from one noted state; a large tensor is several pieces. A multiple of 16, see `_fills_in_pieces`."""

LEAST = 1 << 26
"""Fewer drawn elements than this are not worth a file."""

MOST_THREADS = 16

T = TypeVar("T", bound=nn.Module)

_aten = torch.ops.aten
_FILLS = (_aten.normal_.default, _aten.uniform_.default)
_WRITES = (_aten.zero_.default, _aten.fill_.Scalar)
_VIEWS = (_aten.detach.default, _aten.select.int, _aten.slice.Tensor, _aten.view.default, _aten.t.default)


class UnlikeNotedError(Exception):
    """The model draws otherwise than was noted."""


def draw(build: Callable[[], T], config: PretrainedConfig, seed: int) -> T:
    """What `build` makes, whose random weights come from torch's CPU generator, seeded here with `seed`.

    The same as calling `build` under that seed; the generator is left anywhere. `config` tells one model from another.
    """
    path = cache_folder() / "generator-states" / f"{_key(config, seed)}.npz"
    torch.default_generator.manual_seed(seed)
    noted = _load(path)
    if noted is not None:
        with suppress(UnlikeNotedError):
            return _replay(build, *noted)
        torch.default_generator.manual_seed(seed)
    if not _fills_in_pieces():
        return build()
    with _Note() as note:
        made = build()
    if note.complete and sum(note.sizes) >= LEAST:
        _save(path, note)
    return made


def _key(config: PretrainedConfig, seed: int) -> str:
    software = {"torch": torch.__version__, "transformers": transformers.__version__, "piece": PIECE}
    return digest({"config": config.to_dict(), "class": type(config).__name__, "seed": seed, **software})[:32]


def _replay(build: Callable[[], T], sizes: list[int], states: torch.Tensor) -> T:
    with _Defer(sizes, states) as deferred:
        made = build()
    deferred.finish(made)
    return made


def _is_fill(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether it draws from the default generator into a whole dense tensor of the CPU."""
    if function not in _FILLS or options.get("generator") is not None:
        return False
    return arguments[0].device.type == "cpu" and _is_whole(arguments[0])


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is all of its storage, in order, and not empty."""
    return tensor.is_contiguous() and 0 < tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


class _Note(TorchDispatchMode):
    """Notes the state of the default generator before every piece that is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.states: list[torch.Tensor] = []
        self.complete = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        options = kwargs or {}
        if not _is_fill(function, args, options):
            self.complete &= torch.Tag.nondeterministic_seeded not in function.tags or not _on_cpu(args)
            return function(*args, **options)
        self.sizes.append(args[0].numel())
        for piece in _pieces(args[0]):
            self.states.append(torch.default_generator.get_state())
            function(piece, *args[1:], **options)
        return args[0]


class _Defer(TorchDispatchMode):
    """Keeps fills and the simple writes that follow them back until `finish`, or until another operation needs the tensor."""

    def __init__(self, sizes: list[int], states: torch.Tensor) -> None:
        super().__init__()
        self._sizes, self._states = iter(sizes), iter(states)
        self._left = len(sizes)
        self._waiting: dict[int, list[partial[Any]]] = {}
        """Address of a storage -> what is to be done to it, in order. A task holds its tensor, so no address is used again."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        options = kwargs or {}
        if _is_fill(function, args, options):
            self._defer_fill(function, args, options)
            return args[0]
        if function in _WRITES and _address(args[0]) in self._waiting:
            before = [] if _is_whole(args[0]) else self._waiting[_address(args[0])]
            self._waiting[_address(args[0])] = [*before, partial(function, *args, **options)]
            return args[0]
        if function not in _VIEWS:
            for leaf in tree_leaves((args, options)):
                if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and (tasks := self._waiting.pop(_address(leaf), None)):
                    _in_order(tasks)
        return function(*args, **options)

    def _defer_fill(self, function: Any, args: Any, options: Any) -> None:
        if next(self._sizes, None) != args[0].numel():
            raise UnlikeNotedError
        self._left -= 1
        pieces = [(piece, next(self._states)) for piece in _pieces(args[0])]
        # a whole fill makes what was to come before it void
        self._waiting[_address(args[0])] = [partial(_fill, function, piece, state, args[1:], options) for piece, state in pieces]

    def finish(self, made: nn.Module) -> None:
        """Do what waits for a tensor of `made`: a tied head has dropped its own. Raises UnlikeNotedError for fewer fills than noted."""
        if self._left:
            raise UnlikeNotedError
        fills: list[partial[Any]] = []
        rest: list[partial[Any]] = []
        for address in {_address(tensor) for tensor in (*made.parameters(), *made.buffers())}:
            tasks = self._waiting.get(address, [])
            fills += [task for task in tasks if task.func is _fill]
            rest += [task for task in tasks if task.func is not _fill]
        with ThreadPoolExecutor(_threads()) as pool:
            list(pool.map(_do, sorted(fills, key=lambda task: -task.args[1].numel())))
        _in_order(rest)


def _threads() -> int:
    """The share of the usable cores that is one rank's."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))


@torch.no_grad()
def _do(task: partial[Any]) -> None:
    task()


def _in_order(tasks: list[partial[Any]]) -> None:
    for task in tasks:
        _do(task)


def _fill(function: Any, piece: torch.Tensor, state: torch.Tensor, arguments: Any, options: dict[str, Any]) -> None:
    generator = torch.Generator()
    generator.set_state(state.clone())  # torch reads past an offset into a storage
    function(piece, *arguments, **{**options, "generator": generator})


def _pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The elements of a dense tensor in order, PIECE at a time; the last piece is the longer one."""
    flat = tensor.detach().view(-1)
    edges = [*range(0, max(1, flat.numel() // PIECE) * PIECE, PIECE), flat.numel()]
    return [flat[begin:end] for begin, end in pairwise(edges)]


def _fills_in_pieces() -> bool:
    """Whether this torch fills a tensor with the same numbers piece by piece (it draws 16 at a time) as at once."""
    for function in _FILLS:
        whole, parts = torch.empty(16 * 9 + 5), torch.empty(16 * 9 + 5)
        function(whole, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(1)
        for piece in (parts[:64], parts[64:128], parts[128:]):
            function(piece, generator=generator)
        if not torch.equal(whole, parts):
            return False
    return True


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _on_cpu(arguments: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in tree_leaves(arguments))


def _load(path: Path) -> tuple[list[int], torch.Tensor] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["sizes"].tolist(), torch.from_numpy(file["states"])
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _save(path: Path, note: _Note) -> None:
    """Keep the note; a cache that cannot be written is no loss."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".draft", delete=False) as file:
            np.savez(file, sizes=np.array(note.sizes), states=torch.stack(note.states).numpy())
        Path(file.name).replace(path)
