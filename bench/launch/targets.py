"""What Snakemake must know of a plan: the files to make and what each is made from. Torch-free; used by the Snakefile."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.cell import Cell, canonical_json, cell_to_json
from bench.container.images import images
from bench.data.sources import resolve
from bench.errors import UserError
from bench.launch.allocation import Allocation, allocation, host_bytes
from bench.layout import Layout
from bench.matrix import cell_data, load_plan


class Targets:
    """The files of one suite, whose folder (results/<suite>) holds plan.json.

    Raises UserError if there is no plan, or if two data names would share a manifest.
    """

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.plan = load_plan(self.layout.plan)
        self.blocks = {block.block_id: block for block in self.plan.blocks}
        self.warm = {warm.key: warm for warm in self.plan.warm}
        self.data = {self.layout.data(name).stem: name for name in self.plan.data}
        if len(self.data) < len(self.plan.data):
            lost = sorted(set(self.plan.data) - set(self.data.values()))
            raise UserError(f"two data names differ only in letters that file names lack; seen: {', '.join(lost)}; rename the file")

    def patterns(self) -> dict[str, str]:
        """Wildcard -> regular expression that admits what the plan has, and nothing else."""
        return {
            "block": _any_of(self.blocks),
            "cell": _any_of(self.plan.cells),
            "data": _any_of(self.data),
            "image": _any_of(images()),
            "warm": _any_of(self.warm),
        }

    def cell_text(self, cell_id: str) -> str:
        """A cell as one line of JSON."""
        return canonical_json(cell_to_json(self.plan.cells[cell_id]))

    def data_inputs(self, stem: str) -> list[Path]:
        """The user's own file that the rows come from; other data is made from nothing that is here."""
        path = resolve(self.data[stem]).user_file
        return [] if path is None else [path]

    def warm_inputs(self, key: str) -> list[Path]:
        """Manifests of its data, and the warm starts that it begins from."""
        warm = self.warm[key]
        names = cell_data(warm.cell) if warm.cell else tuple((warm.tokenizer or {}).get("data", ()))
        images = self._images([warm.cell] if warm.cell else [])
        return [self.layout.data(name) for name in names] + self._done(warm.starts.values()) + images

    def block_inputs(self, block_id: str) -> list[Path]:
        """Its cells, manifests of their data, the warm starts that they begin from, and the blocks that come before."""
        block = self.blocks[block_id]
        paths = [self.layout.cell(cell_id) for cell_id in block.cells] + [self.layout.data(name) for name in block.data]
        begun = sorted({start for starts in block.starts.values() for start in starts.values() if start in self.warm})
        images = self._images(self.plan.cells[cell_id] for cell_id in block.cells)
        return paths + self._done(begun) + [self.layout.block(earlier) for earlier in block.after] + images

    def block_resources(self) -> dict[str, Callable[[Any], int | str]]:
        """What a block asks of a scheduler: resource -> function of the rule's wildcards."""
        found = {
            key: allocation([self.plan.cells[cell_id] for cell_id in block.cells], self.plan.limits) for key, block in self.blocks.items()
        }
        return {name: _resource(found, "block", name) for name in Allocation._fields}

    def warm_resources(self) -> dict[str, Callable[[Any], int | str]]:
        """What a warm start asks of a scheduler; a tokenizer needs what the smallest trial does."""
        smallest = min(self.plan.cells.values(), key=host_bytes)
        alone = dataclasses.replace(smallest, nodes=1, processes_per_node=1)
        found = {key: allocation([warm.cell or alone], self.plan.limits) for key, warm in self.warm.items()}
        return {name: _resource(found, "warm", name) for name in Allocation._fields}

    def all_blocks(self) -> list[Path]:
        """What the report is made from."""
        return [self.layout.block(block_id) for block_id in self.blocks]

    def _images(self, cells: Iterable[Cell]) -> list[Path]:
        """Images that these cells name; an image's file is there already."""
        return [self.layout.image(name) for name in sorted({cell.settings.container for cell in cells} & images().keys())]

    def _done(self, keys: Iterable[str]) -> list[Path]:
        return [self.layout.warm(key) / "done.json" for key in keys]


def _resource(found: dict[str, Allocation], wildcard: str, name: str) -> Callable[[Any], int | str]:
    return lambda wildcards: getattr(found[getattr(wildcards, wildcard)], name)


def _any_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names)) or "(?!)"
