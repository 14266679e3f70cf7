"""What a suite file may say, and what it is told when it says something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.errors import SuiteError, UserError
from bench.matrix import known_names, make_plan
from bench.suite import Suite, check_suite, load_yaml, read_suite, suite_schema

MINIMAL = """
suite: small
axes: {stage: [sft], model: [bloom-tiny], strategy: [naive, ddp]}
settings: {device: cpu, learning_rate: 1e-3}
stages: {sft: {steps: 10}}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "suite.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def check(content: Any) -> Suite:
    return check_suite(content, "suite.yaml", known_names(), Path())


def mistakes(content: Any) -> dict[str, str]:
    with pytest.raises(SuiteError) as caught:
        check(content)
    return {mistake.path: mistake.problem for mistake in caught.value.mistakes}


def minimal(**changes: Any) -> dict[str, Any]:
    content = {
        "suite": "small",
        "axes": {"stage": ["sft"], "model": ["bloom-tiny"], "strategy": ["naive"]},
        "settings": {"device": "cpu"},
        "stages": {"sft": {"steps": 10}},
    }
    return {**content, **changes}


def test_a_good_suite_is_read(tmp_path: Path) -> None:
    suite = read_suite(write(tmp_path, MINIMAL), known_names())
    assert suite.axes.strategy == ["naive", "ddp"]
    assert suite.settings["learning_rate"] == 1e-3
    assert suite.trials == 1


def test_all_mistakes_are_told_at_once_with_path_problem_and_value() -> None:
    content = minimal(
        axes={"stage": ["sft", "sfd"], "model": ["bloom-tiny"], "strategy": ["zero9"], "lora_rank": [-1], "nodes": []},
        settings={"precision": "fp8", "learning_rat": 1, "nodes": 2},
        trials=0,
        exclude=[{"strateg": "naive"}],
    )
    with pytest.raises(SuiteError) as caught:
        check(content)
    text = str(caught.value)
    for line in (
        "axes.stage[1]: unknown stage, did you mean 'sft'?; seen: 'sfd'",
        "axes.strategy[0]: unknown strategy",
        "axes.lora_rank[0]: lora_rank is a whole number from 0 to 65536; seen: -1",
        "axes.nodes: at least one value is needed; seen: []",
        "settings.learning_rat: unknown setting of sft, did you mean 'learning_rate'?; seen: 1",
        "settings.nodes: unknown setting of sft, an axis: it goes under axes; seen: 2",
        "settings.precision: ",
        "trials: ",
        "exclude[0].strateg: unknown axis, did you mean 'strategy'?; seen: 'strateg'",
    ):
        assert line in text
    assert text.count("axes.lora_rank[0]") == 1
    assert text.startswith("suite.yaml: ")


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"axes": {"stage": ["sft"], "model": ["bloom-tiny"]}}, "axes.strategy"),
        ({"axes": {"stage": ["sft"], "model": ["blom-560m"], "strategy": ["naive"]}}, "axes.model[0]"),
        ({"axes": {"stage": ["sft"], "model": ["bloom-tiny"], "strategy": ["naive", "naive"]}}, "axes.strategy"),
        ({"suite": "Has Spaces"}, "suite"),
        ({"stages": {"sft": {"steps": 10, "data": "no-such-data"}}}, "stages.sft.data"),
        ({"stages": {"sft": {"steps": 10, "data": "file:no/such/file.json"}}}, "stages.sft.data"),
        ({"stages": {"dpo": {}}}, "stages.dpo"),
        ({"include": [{"stage": "sft", "strategy": "naive"}]}, "include[0].model"),
        ({"overrides": [{"when": {"stage": "sft"}, "settings": {"kl_coef": 1}}]}, "overrides[0].settings.kl_coef"),
        ({"settings": {"trust_remote_code": True}}, "settings.trust_remote_code"),
        ({"limits": {"timeout_seconds": 0}}, "limits.timeout_seconds"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_mistake_is_told_with_its_path(change: dict[str, Any], path: str) -> None:
    assert path in mistakes(minimal(**change))


def test_a_setting_of_one_stage_only_does_not_fit_a_suite_with_others() -> None:
    axes = {"stage": ["sft", "ppo"], "model": ["bloom-tiny"], "strategy": ["naive"]}
    assert "settings.kl_coef" in mistakes(minimal(axes=axes, settings={"kl_coef": 0.1}))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1, 2", "not YAML"),
        ("a: 1\na: 2\n", "the key 'a' stands twice"),
        ("1: 2\n", "a key is not text"),
        ("a: &x [*x]\n", "contains itself"),
        ("a: !!python/object/apply:os.system ['true']\n", "not YAML"),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"{x}: &{x} [{', '.join([f'*{y}'] * 10)}]\n" for y, x in zip("abcdefg", "bcdefgh", strict=True)),
            "aliases stand for",
        ),
        ("- just\n- a list\n", "a suite is a mapping"),
        ("", "a suite is a mapping"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
def test_what_is_not_a_suite_is_refused_in_words(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem.replace("(", r"\(")) as caught:
        read_suite(write(tmp_path, text), known_names())
    assert "suite.yaml" in str(caught.value)


def test_a_missing_file_a_folder_a_binary_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        load_yaml(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="a folder or device"):
        load_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\x80\x81\xff")
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_yaml(tmp_path / "binary.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(UserError, match="at most 1048576 bytes"):
        load_yaml(tmp_path / "huge.yaml")


def test_a_number_in_exponent_form_is_a_number(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path, "a: 2e-5\nb: 1E3\nc: 2e-5x\n")) == {"a": 2e-5, "b": 1000.0, "c": "2e-5x"}


def test_the_schema_names_every_setting() -> None:
    schema = suite_schema()
    assert "kl_coef" in schema["$defs"]["PpoSettings"]["properties"]
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("axes: {stage: [[sft]], model: [bloom-tiny], strategy: [naive]}", "axes.stage[0]: stage is a name, as text; seen: ['sft']"),
        ("exclude: [{stage: {}}]", "exclude[0].stage: stage is a name, as text; seen: {}"),
        ("overrides: [{when: {stage: {}}, settings: {}}]", "overrides[0].when.stage: stage is a name, as text; seen: {}"),
        ("include: [{stage: [sft], model: bloom-tiny, strategy: naive}]", "include[0].stage: a cell that is included has one value"),
        ("include: [{stage: sft, model: 1, strategy: naive}]", "include[0].model: model is a name, as text; seen: 1"),
        ("include: [{stage: sft, model: bloom-tiny, strategy: naive, lora_rank: []}]", "include[0].lora_rank: a cell that is included"),
        (f"include: [{{stage: sft, model: bloom-tiny, strategy: naive, nodes: {10**30}}}]", "nodes is a whole number from 1 to 10000"),
        (f"settings: {{sequence_length: {10**30}}}", "settings.sequence_length: Input should be less than or equal to 1000000000"),
    ],
)
def test_what_has_no_place_on_an_axis_is_a_mistake_like_others(tmp_path: Path, text: str, words: str) -> None:
    plain = {
        "suite": "suite: t",
        "axes": "axes: {stage: [sft], model: [bloom-tiny], strategy: [naive]}",
        "stages": "stages: {sft: {steps: 4}}",
    }
    file = tmp_path / "s.yaml"
    file.write_text("\n".join({**plain, text.partition(":")[0]: text}.values()))
    with pytest.raises(UserError) as refusal:
        make_plan(file)
    assert words in str(refusal.value)
