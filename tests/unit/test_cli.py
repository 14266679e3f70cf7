"""The command line: help for newcomers, one clear text and exit code 2 for a user's mistake, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cli import _exit_code

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "config" / "quickstart.yaml")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = _exit_code(list(arguments))
    seen = capsys.readouterr()
    return code, seen.out, seen.err


def test_help_opens_with_the_users_question_and_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert "Which way of training a chat model fits and is fastest on my cluster" in " ".join(out.split())
    for verb in ("run", "plan", "report", "retry", "data", "doctor", "checkpoint", "schema"):
        assert verb in out


def test_plan_prints_cells_blocks_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", QUICKSTART)
    assert code == 0
    assert "Suite quickstart: 42 cells x 1 trial in 6 blocks; 6 skipped." in out
    assert "Skipped ppo naive x 2: naive runs on one rank only" in out


def test_plan_as_json_has_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", QUICKSTART, "--format", "json")
    content = json.loads(out)
    assert (code, len(content["cells"]), len(content["skipped"])) == (0, 42, 6)
    assert (content["claims"], isinstance(content["cost"], list)) == ([], True)


def test_plan_says_what_its_trials_can_claim_and_what_they_cost(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chain = str(ROOT / "config" / "reference" / "chain-560m.yaml")
    _, out, _ = call(capsys, "plan", chain, "--results", str(ROOT / "results"), "--price", "4")
    assert "needs 7 trials" in out
    assert "Cost on NVIDIA H100 80GB HBM3: " in out
    assert " at 4 each; " in out
    _, out, _ = call(capsys, "plan", chain, "--results", str(tmp_path))
    assert "Cost: unknown; no earlier ok trial of " in out


def test_plan_commands_prints_a_line_for_every_node(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", str(ROOT / "config" / "reference" / "llama-7b-3x6.yaml"), "--commands")
    lines = [line for line in out.splitlines() if line.startswith("coati-bench trial ")]
    assert code == 0
    assert [f"--node-rank {rank} --rendezvous $HEAD:29500" in line for rank, line in enumerate(lines)] == [True] * 3
    assert all("--nodes 3 " in line and "/cells/" in line for line in lines)
    assert "coati-bench data fetch " in out
    assert " --write" in out


@pytest.mark.parametrize("suite", sorted((ROOT / "config").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_suite_of_the_project_can_be_planned(capsys: pytest.CaptureFixture[str], suite: Path) -> None:
    code, out, err = call(capsys, "plan", str(suite))
    assert (code, err) == (0, "")
    assert ": 0 cells" not in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plan", "absent.yaml"], "there is no such file"),
        (["plan", "."], "a folder or device"),
        (["plan", QUICKSTART, "--format", "xml"], "--format is text or json; seen: 'xml'"),
        (["run", "absent.yaml"], "there is no such file"),
        (["report", "absent", "--output", "out"], "absent"),
        (["compare", "absent", "absent"], "absent"),
        (["reproduce", "absent"], "absent"),
        (["retry", QUICKSTART, "--outcome", "crashed"], "no such outcome; choose among"),
        (["checkpoint", "inspect", "absent"], "absent"),
        (["data", "fetch", "no-such-data"], "no-such-data"),
        (["block", "results/none/blocks/none.json"], "no plan to be read"),
        (["warm", "results/none/warm/none/done.json"], "no plan to be read"),
        (["no-such-verb"], "No such command"),
        (["plan"], "Missing argument"),
    ],
)
def test_a_mistake_gets_a_text_exit_code_2_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *arguments)
    assert code == 2, err
    assert text in err
    assert "Traceback" not in err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_bad_suite_is_told_every_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    suite = tmp_path / "bad.yaml"
    suite.write_text(
        "suite: bad\naxes: {stage: [sft], model: [bloom-tiny], strategy: [zero9], lora_rank: [-1], nodes: []}\n", encoding="utf-8"
    )
    code, _, err = call(capsys, "plan", str(suite))
    assert code == 2
    for path in ("axes.strategy[0]", "axes.lora_rank[0]", "axes.nodes"):
        assert path in err


def test_planning_and_help_never_load_torch() -> None:
    calls = f"_exit_code(['plan', {QUICKSTART!r}])\n_exit_code(['--help'])"
    program = f"import sys\nfrom bench.cli import _exit_code\n{calls}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_fault_of_the_program_is_no_verdict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare` and `reproduce` say 1 of a regression."""

    def broken(*_: object, **__: object) -> int:
        raise KeyError("x")

    monkeypatch.setattr("bench.report.compare.compare", broken)
    code, _, err = call(capsys, "compare", "a", "b")
    assert code == 3
    assert "Traceback" in err
    assert err.endswith("coati-bench: KeyError: 'x': a fault of coati-bench itself; please report it with the lines above\n")


@pytest.mark.parametrize("price", ["inf", "nan", "1e400"])
def test_a_price_is_a_finite_number(capsys: pytest.CaptureFixture[str], price: str) -> None:
    assert call(capsys, "plan", QUICKSTART, "--price", price)[0] == 2


def test_a_terminal_that_has_no_arrow_shows_a_question_mark() -> None:
    folder = str(ROOT / "results" / "references" / "nvidia-h200" / "reference-bloom-560m")
    line = [sys.executable, "-m", "bench", "compare", folder, folder]
    done = subprocess.run(line, capture_output=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
