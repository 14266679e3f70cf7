"""What Snakemake would do is what the plan says, and nothing else."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.errors import UserError
from bench.launch import workflow
from bench.launch.targets import Targets
from bench.layout import Layout
from bench.matrix import Plan, expand, load_plan, make_plan, save_plan
from bench.suite import Known, check_suite

ROOT = Path(__file__).parents[2]


def would_make(output: str) -> list[str]:
    return [name for line in re.findall(r"^ +output: (.*)$", output, re.MULTILINE) for name in line.split(", ")]


def test_a_dry_run_lists_exactly_the_files_of_the_plan(folder: Any) -> None:
    plan = make_plan(ROOT / "config" / "quickstart.yaml")
    layout = Layout(folder.path / "results" / "tiny")
    save_plan(plan, layout.plan)
    done = folder.snakemake("-n", snakefile=ROOT / "Snakefile")
    assert done.returncode == 0, done.stdout
    wanted = [layout.cell(cell_id) for cell_id in plan.cells] + [layout.data(name) for name in plan.data]
    wanted += [layout.warm(warm.key) / "done.json" for warm in plan.warm] + [layout.block(block.block_id) for block in plan.blocks]
    wanted += [layout.report / "report.html"]
    assert sorted(would_make(done.stdout)) == sorted(str(path.relative_to(folder.path)) for path in wanted)
    assert not any(path.name != "plan.json" for path in layout.root.iterdir())


@pytest.mark.parametrize(
    "target", ["cells/sft-other.json", "blocks/sft-bloom-tiny-9x9-trial0.json", "data/hh-rlhf.json", "warm/other/done.json"]
)
def test_snakemake_makes_nothing_that_the_plan_lacks(folder: Any, target: str) -> None:
    save_plan(make_plan(ROOT / "config" / "quickstart.yaml"), Layout(folder.path / "results" / "tiny").plan)
    done = folder.snakemake("-n", f"results/tiny/{target}", snakefile=ROOT / "Snakefile")
    assert done.returncode == 1
    assert "MissingRuleException" in done.stdout


def targets_of(path: Path, **changes: Any) -> Targets:
    content = {
        "suite": "tiny",
        "axes": {"stage": ["sft", "rm"], "model": ["bloom-tiny"], "strategy": ["naive", "ddp"]},
        "settings": {"device": "cpu"},
        "stages": {"sft": {"steps": 3}, "rm": {"steps": 3}},
        **changes,
    }
    known = Known(strategies=("naive", "ddp"), model_problem=lambda _: None, data_problem=lambda *_: None)
    save_plan(expand(check_suite(content, "tiny.yaml", known, path), "tiny.yaml"), Layout(path).plan)
    return Targets(path)


def test_a_block_waits_for_its_cells_data_and_warm_starts(tmp_path: Path) -> None:
    targets = targets_of(tmp_path)
    block = next(block for block in targets.plan.blocks if block.stage == "rm")
    tokenizer, start = (next(key for key in targets.warm if key.startswith(name)) for name in ("tokenizer", "sft"))
    inputs = {str(path.relative_to(tmp_path)) for path in targets.block_inputs(block.block_id)}
    assert inputs == {f"cells/{cell_id}.json" for cell_id in block.cells} | {
        "data/synthetic-pairs.json", f"warm/{tokenizer}/done.json", f"warm/{start}/done.json",
    }  # fmt: skip
    assert {str(path.relative_to(tmp_path)) for path in targets.warm_inputs(start)} == {
        "data/synthetic-instruct.json", f"warm/{tokenizer}/done.json",
    }  # fmt: skip


def test_a_chained_block_waits_for_the_block_that_it_continues(tmp_path: Path) -> None:
    targets = targets_of(tmp_path, settings={"device": "cpu", "warm_start": "chain"})
    earlier, later = (next(block for block in targets.plan.blocks if block.stage == stage) for stage in ("sft", "rm"))
    assert targets.layout.block(earlier.block_id) in targets.block_inputs(later.block_id)
    assert not any("warm/sft" in str(path) for path in targets.block_inputs(later.block_id))


@pytest.mark.parametrize("made_from_it", ["", "+synthetic-instruct"])
def test_a_file_of_the_user_is_an_input_of_its_manifest_and_of_what_is_made_from_it(tmp_path: Path, made_from_it: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "input": "", "output": "b"}\n', encoding="utf-8")
    data = f"file:{rows}{made_from_it}"
    targets = targets_of(tmp_path, stages={"sft": {"steps": 3, "data": data}, "rm": {"steps": 3, "warm_start": "none"}})
    inputs = [path for stem in targets.data for path in targets.data_inputs(stem)]
    assert inputs == [rows]


def test_data_names_that_would_share_a_manifest_are_refused(tmp_path: Path) -> None:
    stages = {"sft": {"steps": 3, "data": "file:a/b"}, "rm": {"steps": 3, "data": "file:a_b", "warm_start": "none"}}
    with pytest.raises(UserError, match=r"two data names differ only in letters that file names lack; seen: file:a"):
        targets_of(tmp_path, stages=stages)


@pytest.mark.parametrize("name", ["\u00fc", "q'uo\"te", "ta\tb", "#x", "-dash", "1e5", "back\\slash $HOME"])
def test_the_results_may_lie_in_a_folder_of_any_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []

    def dry(suite: Path, plan: Plan, layout: Layout, profile: Path, *_: object) -> int:
        workflow._write_settings(layout.root)
        command = [*workflow.snakemake_command(layout.root, profile), "-n", "--printshellcmds"]
        done = subprocess.run(
            command, env=workflow._environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        seen.append(done.stdout)
        return done.returncode

    monkeypatch.setattr(workflow, "_run", dry)
    assert workflow.run_suite(ROOT / "config" / "quickstart.yaml", results=Path(name) / "res") == 0, seen
    start = "Shell command: coati-bench block "
    targets = [" ".join(shlex.split(line.removeprefix(start))) for line in seen[0].splitlines() if line.startswith(start)]
    plan = load_plan(Path(name) / "res" / "quickstart" / "plan.json")
    blocks = {(tmp_path / name / "res" / "quickstart" / "blocks" / f"{block.block_id}.json") for block in plan.blocks}
    assert {tmp_path / target for target in targets} == blocks
    assert not any(target.startswith("-") for target in targets)
