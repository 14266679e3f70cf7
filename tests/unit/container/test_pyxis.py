from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cell import cell_from_json
from bench.cli import app
from bench.container.inputs import package_digest
from bench.container.pyxis import pyxis_line
from bench.errors import UserError
from bench.record import Input
from bench.trial import make_trial, save_trial

GOLDEN = (
    "srun --nodes 2 --ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=1 --container-image={root}/x.sqfs "
    "--container-mounts={root}/cache:{root}/cache:ro,{root}/r/suite:{root}/r/suite:rw,{root}/r/suite/logs/c/0:{root}/r/suite/logs/c/0:rw "
    "--container-readonly --no-container-mount-home --no-container-entrypoint bash -c "
    "'exec env PYTHONPATH=/opt/coati-bench OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 /opt/venv/bin/python -m torch.distributed.run --nnodes 2 "
    '--node-rank "$SLURM_PROCID" --nproc-per-node 1 --master-addr "$HEAD" --master-port 29500 --max-restarts 0 '
    "-m bench.launch.rank {root}/r/suite/logs/c/0/trial.json bench.worker'"
)


def trial_in(tmp_path, monkeypatch, image=True, **changes):
    monkeypatch.setenv("COATI_BENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    cell = cell_from_json(
        {"stage": "sft", "model": "bloom-tiny", "strategy": "ddp", "steps": 2, "device": "cpu", "nodes": 2, "container": "cpu", **changes}
    )
    facts = {"package_sha256": package_digest()}
    image = Input(name="container", path=str(tmp_path / "x.sqfs"), sha256="a" * 64, facts=facts) if image else None
    return make_trial(cell, 0, image=image, work=str(tmp_path / "r" / "suite" / "logs" / "c" / "0"))


def test_the_step_is_rendered_with_image_and_mounts_and_says_that_it_is_untested(tmp_path, monkeypatch):
    trial = trial_in(tmp_path, monkeypatch)
    file = Path(trial.work) / "trial.json"
    save_trial(trial, file)
    done = CliRunner().invoke(app, ["container", "pyxis", str(file)])
    said, line = done.stdout.splitlines()
    assert said.startswith("# untested: ")
    assert line == GOLDEN.format(root=tmp_path)


def test_ranks_beside_gpus_share_the_cores_of_their_node(tmp_path, monkeypatch):
    trial = trial_in(tmp_path, monkeypatch, device="cuda", container="current", processes_per_node=4, global_batch=8)
    assert "OMP_NUM_THREADS=$(( $(nproc) / 4 )) " in pyxis_line(trial, Path(trial.work) / "trial.json")


def test_a_trial_without_an_image_and_what_is_no_trial_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="its ranks run in no image"):
        pyxis_line(trial_in(tmp_path, monkeypatch, image=False), Path("trial.json"))
    done = CliRunner().invoke(app, ["container", "pyxis", str(tmp_path / "none.json")])
    assert isinstance(done.exception, UserError)
    assert "no trial; seen: " in str(done.exception)
