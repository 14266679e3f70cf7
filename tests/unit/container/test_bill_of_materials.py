from __future__ import annotations

import json
import shutil
import subprocess
import sys
from email.parser import HeaderParser

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.container.bill_of_materials import Material, cyclonedx, licence_stated, licence_table, of_file, of_locks
from bench.container.images import image_named
from bench.errors import MachineError, UserError

METADATA = "Metadata-Version: 2.4\nName: alpha\nVersion: 1.0\nLicense-Expression: MIT\n\nA text.\n"
STATUS = "Package: libc6\nStatus: install ok installed\nVersion: 2.36-9\n"


def root_with_packages(folder):
    for name, text in (
        ("opt/venv/lib/python3.11/site-packages/alpha-1.0.dist-info/METADATA", METADATA),
        ("opt/venv/lib/python3.11/site-packages/alpha/__init__.py", ""),
        ("var/lib/dpkg/status", STATUS),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_the_locks_name_every_package_with_its_hashes_and_licence():
    found = {it.name: it for it in of_locks(image_named("cpu"))}
    assert {"torch", "colossalai", "transformers", "numpy"} <= found.keys()
    assert all(it.sha256 and all(len(value) == 64 for value in it.sha256) for it in found.values())
    assert found["pyyaml"].licence == "MIT License"
    assert "ruff" not in found


@pytest.mark.skipif(not (shutil.which("mksquashfs") and shutil.which("unsquashfs")), reason="needs squashfs-tools")
def test_an_images_file_is_read_itself(tmp_path):
    root_with_packages(tmp_path / "root")
    file = tmp_path / "x.sqfs"
    subprocess.run(["mksquashfs", tmp_path / "root", file, "-quiet", "-no-progress"], check=True, capture_output=True)
    assert of_file(file) == [
        Material("deb", "libc6", "2.36-9", "see /usr/share/doc/libc6/copyright"),
        Material("pypi", "alpha", "1.0", "MIT"),
    ]
    file.write_text("no image")
    with pytest.raises(UserError, match="not an image whose packages can be read"):
        of_file(file)
    with pytest.raises(UserError, match="there is no such file"):
        of_file(tmp_path / "y.sqfs")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("License-Expression: MIT\nLicense: another", "MIT"),
        ("Classifier: License :: OSI Approved :: BSD License\nLicense: long text", "BSD License"),
        ("Classifier: License :: OSI Approved\nLicense: Apache 2.0", "Apache 2.0"),
        ("License: UNKNOWN", "not stated"),
        ("Name: x", "not stated"),
    ],
)
def test_the_licence_is_the_packages_own_statement(fields, said):
    assert licence_stated(HeaderParser().parsestr(fields)) == said


def test_the_table_has_a_row_for_each_package():
    table = licence_table([Material("pypi", "b", "2", "A|B"), Material("pypi", "a", "1")])
    assert table.splitlines()[2:] == ["| a | 1 | not stated |", "| b | 2 | A/B |"]


def test_a_bill_is_cyclonedx_and_the_same_each_time():
    pytest.importorskip("cyclonedx", reason="`make install-sbom` would be right")
    materials = [Material("pypi", "alpha", "1.0", "MIT", ("a" * 64,)), Material("deb", "libc6", "2.36-9", "see there")]
    text = cyclonedx(materials, name="coati-bench-cpu", version="sha256:ab", epoch=1764547200)
    assert text == cyclonedx(materials[::-1], name="coati-bench-cpu", version="sha256:ab", epoch=1764547200)
    bill = json.loads(text)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert [it["purl"] for it in bill["components"]] == ["pkg:pypi/alpha@1.0", "pkg:deb/debian/libc6@2.36-9"]
    assert bill["components"][0]["licenses"] == [{"license": {"id": "MIT"}}]


def test_without_the_tool_the_extra_is_named_and_the_table_still_comes(monkeypatch):
    monkeypatch.setitem(sys.modules, "cyclonedx.model.bom", None)
    with pytest.raises(MachineError, match=r"cyclonedx-python-lib; seen: it is not installed; .*`make install-sbom`"):
        cyclonedx([], name="x", version="1", epoch=0)
    done = CliRunner().invoke(app, ["container", "bill", "cpu", "--licences"])
    assert done.exit_code == 0
    assert "| transformers | 4.51.3 |" in done.stdout
