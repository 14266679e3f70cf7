"""The lines of the template for a site, the `#` taken away: what Snakemake's plugin makes of them for sbatch."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bench.launch.queue import PLUGIN

pytestmark = pytest.mark.skipif(importlib.util.find_spec(PLUGIN) is None, reason="Snakemake's plugin for Slurm: make install-slurm")
TEMPLATE = Path(__file__).parents[3] / "profiles" / "slurm-site-template" / "config.yaml"
SNAKEFILE = """
rule block:
    output: "done"
    resources: nodes=2, tasks=2, mpi="true", runtime=70, mem_mb=1000, gres="gpu:8"
    shell: "touch {output}"
"""
SBATCH = '#!/bin/sh\nfor word; do echo "$word"; done > "{folder}/said"\nexit 1\n'
ACCOUNTS = "#!/bin/sh\necho account\n"


def site(devices: str) -> str:
    """A site's profile: all lines of the template without `#`; devices asked for by gres or by --gpus-per-node."""
    text = TEMPLATE.read_text(encoding="utf-8").replace("slurm-no-account: true\n", "")
    text = re.sub(r"^# ( {2,}|default-resources:|set-resources:)", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^# (slurm-qos|slurm-reservation)", r"\1", text, flags=re.MULTILINE)
    usual, other = text.split("# Where devices are not a gres but asked for with --gpus:\n")
    content = yaml.safe_load(usual)
    if devices == "gpus":
        content["set-resources"]["block"] |= yaml.safe_load(other)
    return yaml.safe_dump(content)


def asked(folder: Path, profile: str) -> list[str]:
    """What sbatch is asked for a block; it refuses, so that nothing waits."""
    programs, told = folder / "bin", folder / "profile"
    programs.mkdir()
    told.mkdir()
    for name, script in (("sbatch", SBATCH.format(folder=folder)), ("sacctmgr", ACCOUNTS)):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    (told / "config.yaml").write_text(profile)
    (folder / "Snakefile").write_text(SNAKEFILE)
    line = [sys.executable, "-m", "snakemake", "--profile", str(told), "done"]
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (folder / "said").exists(), done.stderr
    return (folder / "said").read_text().splitlines()


@pytest.mark.parametrize(("devices", "wanted", "not_wanted"), [
    ("gres", ["--gres=gpu:h100:8", "--exclusive"], "--gpus-per-node=8"),
    ("gpus", ["--gpus-per-node=8"], "--gres=gpu:h100:8"),
])  # fmt: skip
def test_every_line_of_the_template_reaches_sbatch(tmp_path: Path, devices: str, wanted: list[str], not_wanted: str) -> None:
    words = asked(tmp_path, site(devices))
    said = " ".join(words)
    for option in (
        *wanted,
        "-A ACCOUNT",
        "-p gpu",
        "-t 240",
        "-C nvlink",
        "--qos=QOS",
        "--reservation=RESERVATION",
        "--requeue",
        "--nodes=2",
    ):
        assert option in said, said
    assert not_wanted not in words
    assert "--mem" not in words
