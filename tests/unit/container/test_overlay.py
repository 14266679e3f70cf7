from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.cell import cell_from_json, cell_to_json, identity
from bench.checkout import package_folder, tree_sha256
from bench.container.overlay import overlay_input
from bench.container.runtime import Bind, Container, container_of
from bench.errors import SuiteError, UserError
from bench.launch.assemble import flags, make_provenance
from bench.launch.command import contained
from bench.matrix import make_plan
from bench.record import Input
from bench.report.tables import identity_columns
from bench.trial import make_trial

SUITE = """
suite: overlaid
axes: {{stage: [sft], model: [bloom-tiny], strategy: [naive]}}
settings: {{device: cpu, precision: fp32, steps: 2, launcher: fork, overlay: {{colossalai: {path}}}}}
"""


def cell(**more):
    return cell_from_json({"stage": "sft", "model": "bloom-tiny", "strategy": "naive", "steps": 2, "device": "cpu", **more})


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout as ColossalAI's: the package beside other folders, with a link to one of them."""
    monkeypatch.setenv("COATI_BENCH_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "ColossalAI"
    (root / "extensions").mkdir(parents=True)
    (root / "extensions" / "__init__.py").write_text("WHERE = 'beside the package'\n")
    (root / "colossalai" / "kernel").mkdir(parents=True)
    for name, text in (("__init__.py", "MINE = 1\n"), ("kernel/__init__.py", "")):
        (root / "colossalai" / name).write_text(text)
    (root / "colossalai" / "kernel" / "extensions").symlink_to("../../extensions")
    return root


def trial_with(checkout, tmp_path, image=None):
    overlaid = cell(overlay={"colossalai": str(checkout)}, **({"container": "cpu"} if image else {}))
    return make_trial(overlaid, 0, overlay=overlay_input(overlaid), image=image, work=str(tmp_path / "r" / "logs" / "c" / "0"))


def test_it_is_part_of_a_cell_only_where_it_is_set():
    plain, overlaid = cell(), cell(overlay={"colossalai": "/x"})
    assert "overlay" not in identity(plain)
    assert plain.cell_id != overlaid.cell_id
    assert cell_from_json(cell_to_json(overlaid)) == overlaid


def test_without_a_container_ranks_import_the_checkout_first(checkout, tmp_path):
    trial = trial_with(checkout, tmp_path)
    program = "import colossalai, colossalai.kernel.extensions as it; print(colossalai.MINE, it.WHERE, colossalai.__file__)"
    line, environment, _ = contained([sys.executable, "-c", program], trial, {"PYTHONPATH": "/elsewhere"})
    seen = subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout
    assert seen == f"1 beside the package {trial.overlay.path}/colossalai/__init__.py\n"


def test_in_a_container_it_is_mounted_over_the_images_package(checkout, tmp_path):
    image = Input(name="container", path=str(tmp_path / "x.sqfs"), sha256="a" * 64, facts={})
    trial = trial_with(checkout, tmp_path, image)
    inside = Path("/opt/venv/lib/python3.11/site-packages/colossalai")
    container = container_of(trial)
    assert [bind.option for bind in container.binds if bind.inside] == [f"{trial.overlay.path}/colossalai:{inside}:ro"]
    assert not container._replace(binds=()).covers(container)
    assert not Container(image, (Bind(Path("/a")),)).covers(Container(image, (Bind(Path("/a"), inside=inside),)))


def test_the_record_has_its_hash_and_is_flagged(checkout, tmp_path):
    trial = trial_with(checkout, tmp_path)
    digest = tree_sha256(checkout / "colossalai")
    said = make_provenance(trial, command=[], variables={}, started="", ended="")
    assert said["overlay"] == {"package": "colossalai", "tree_sha256": digest}
    assert f"modified: colossalai {digest[:12]}" in flags(trial, [])
    assert not [flag for flag in flags(dataclasses.replace(trial, overlay=None), []) if flag.startswith("modified")]


class Result(SimpleNamespace):
    __hash__ = object.__hash__


def test_the_report_labels_its_row():
    plain = Result(cell=cell(), flags=())
    overlaid = Result(cell=cell(overlay={"colossalai": "/x"}), flags=("modified: colossalai abc",))
    make = identity_columns([plain, overlaid])[0][1]
    assert (make(plain).text, make(plain).note) == ("naive", "")
    assert (make(overlaid).text, make(overlaid).note) == ("naive", "modified")
    assert make(overlaid).hint.endswith("colossalai abc")


def test_the_same_files_elsewhere_are_the_same_trial_and_an_edit_makes_another(checkout, tmp_path):
    before = trial_with(checkout, tmp_path)
    moved = checkout.rename(tmp_path / "moved")
    assert trial_with(moved, tmp_path).fingerprint == before.fingerprint
    (moved / "extensions" / "__init__.py").write_text("WHERE = 'edited'\n")
    after = trial_with(moved, tmp_path)
    assert after.fingerprint != before.fingerprint
    assert (Path(before.overlay.path) / "colossalai/kernel/extensions/__init__.py").read_text() == "WHERE = 'beside the package'\n"


def test_byte_code_is_not_part_of_it_and_a_changed_copy_is_made_anew(checkout, tmp_path):
    first = trial_with(checkout, tmp_path).overlay
    (checkout / "colossalai" / "__pycache__").mkdir()
    (checkout / "colossalai" / "__pycache__" / "x.pyc").write_bytes(b"1")
    copy = Path(first.path) / "colossalai" / "__init__.py"
    copy.write_text("tampered")
    assert trial_with(checkout, tmp_path).overlay == first
    assert copy.read_text() == "MINE = 1\n"


def test_the_package_folder_itself_will_do_and_what_is_none_is_said(checkout, tmp_path):
    assert package_folder(checkout / "colossalai", "colossalai") == package_folder(checkout, "colossalai")
    with pytest.raises(UserError, match="there is no such path; seen: /nowhere; a checkout"):
        package_folder(Path("/nowhere"), "colossalai")
    with pytest.raises(UserError, match=r"not a package folder; seen: .*extensions without colossalai/__init__.py"):
        package_folder(checkout / "extensions", "colossalai")
    (checkout / "colossalai" / "loop").symlink_to("..")
    with pytest.raises(UserError, match="points to a folder that it lies in"):
        tree_sha256(checkout / "colossalai")


def test_planning_refuses_a_path_that_is_missing_and_reads_a_relative_one_from_the_suites_folder(checkout, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(SUITE.format(path="nowhere"))
    with pytest.raises(SuiteError, match=r"(?s)settings.overlay.colossalai.*there is no such path"):
        make_plan(suite)
    suite.write_text(SUITE.format(path="ColossalAI"))
    (planned,) = make_plan(suite).cells.values()
    assert planned.settings.overlay.colossalai == str(checkout)
