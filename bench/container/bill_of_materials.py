"""What an image is made of: a bill of materials as CycloneDX 1.6, and the licences. Torch-free.

An image's file is read itself, Debian's packages included; an image by name is read from its locks, with the licences of those packages
that are installed here in the same version. The same image gives the same bytes.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import re
import subprocess
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.container.images import Image
from bench.container.overlay import SITE_PACKAGES
from bench.container.requirements import image_packages
from bench.container.tools import require
from bench.errors import MachineError, UserError

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

UNKNOWN = "not stated"
DPKG_STATUS = Path("/var/lib/dpkg/status")
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "coati-bench.bill-of-materials")
_DIGEST = re.compile(r"--hash=sha256:([0-9a-f]{64})")


class Material(NamedTuple):
    """One package of an image."""

    kind: str
    """`pypi` or `deb`."""
    name: str
    version: str
    licence: str = UNKNOWN
    """As the package states it."""
    sha256: tuple[str, ...] = ()
    """Of the files that the lock allows."""


def of_locks(image: Image) -> list[Material]:
    """The Python packages that the image's locks name."""
    packages = image_packages(image)
    return [Material("pypi", it.name, it.version, _licence_here(it.name, it.version), tuple(_DIGEST.findall(it.text))) for it in packages]


def of_file(file: Path) -> list[Material]:
    """The packages in an image's file, Python's and Debian's. Raises UserError for a file that holds none."""
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; an image's file (.sqfs), or the name of an image, would be right")
    require("unsquashfs")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        wanted = [f"{SITE_PACKAGES}/*.dist-info/METADATA".lstrip("/"), str(DPKG_STATUS).lstrip("/")]
        line = ["unsquashfs", "-quiet", "-no-progress", "-dest", str(root), str(file), *wanted]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        found = of_root(root)
    if not found:
        seen = (done.stderr or "no packages").strip().splitlines()[-1]
        raise UserError(
            f"{file}: not an image whose packages can be read; seen: {seen}; a file of `coati-bench container build` would be right"
        )
    return found


def of_root(root: Path) -> list[Material]:
    """The packages in an unpacked root file system."""
    inside = root / SITE_PACKAGES.relative_to("/")
    stated = [HeaderParser().parsestr(path.read_text(encoding="utf-8")) for path in inside.glob("*.dist-info/METADATA")]
    found = [Material("pypi", it["Name"], it["Version"], licence_stated(it)) for it in stated]
    status = root / DPKG_STATUS.relative_to("/")
    return sorted([*found, *(installed(status.read_text(encoding="utf-8")) if status.exists() else ())])


def installed(status: str) -> Iterator[Material]:
    r"""Debian's packages in the text of dpkg's status file; their licences are texts in the image's /usr/share/doc.

    >>> [(it.name, it.version) for it in installed("Package: a\nStatus: install ok installed\nVersion: 1-2\n\nPackage: b\nVersion: 3\n")]
    [('a', '1-2')]
    """
    for chunk in status.strip().split("\n\n"):
        fields = HeaderParser().parsestr(chunk)
        if fields["Status"] == "install ok installed":
            yield Material("deb", fields["Package"], fields["Version"], f"see /usr/share/doc/{fields['Package']}/copyright")


def licence_stated(metadata: Message) -> str:
    """The licence that a Python package's metadata states: its expression, else its classifiers, else the first line of its text."""
    classified = [value.split(" :: ")[-1] for value in metadata.get_all("Classifier", []) if value.startswith("License :: ")]
    classified = [value for value in classified if value != "OSI Approved"]
    text = str(metadata.get("License") or "").strip().partition("\n")[0].strip()
    expression = metadata.get("License-Expression")
    return str(expression) if expression else "; ".join(classified) or (text if text != "UNKNOWN" else "")[:100] or UNKNOWN


def licence_table(materials: Iterable[Material]) -> str:
    """A Markdown table, a row a package."""
    rows = [f"| {it.name} | {it.version} | {it.licence.replace('|', '/')} |" for it in sorted(materials)]
    return "\n".join(["| package | version | licence, as it states it |", "|---|---|---|", *rows])


def cyclonedx(materials: list[Material], *, name: str, version: str, epoch: int) -> str:
    """The bill as CycloneDX 1.6 JSON, made by cyclonedx-python-lib. Raises MachineError where that is not installed."""
    try:
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output.json import JsonV1Dot6
    except ImportError:
        raise MachineError(
            "a bill of materials needs cyclonedx-python-lib; seen: it is not installed; `make install-sbom` would be right, "
            "or `--licences` for the table alone"
        ) from None
    made = dt.datetime.fromtimestamp(epoch, dt.UTC)
    image = Component(name=name, version=version, type=ComponentType.CONTAINER, bom_ref=name)
    bill = Bom(
        components=[_component(it) for it in sorted(materials)],
        metadata=BomMetaData(timestamp=made, component=image),
        serial_number=uuid.uuid5(NAMESPACE, repr((name, version, sorted(materials)))),
    )
    bill.register_dependency(image, list(bill.components))
    return JsonV1Dot6(bill).output_as_string(indent=2) + "\n"


def _component(material: Material) -> Component:
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component
    from packageurl import PackageURL

    purl = PackageURL(material.kind, "debian" if material.kind == "deb" else None, material.name, material.version)
    known = material.kind == "pypi" and material.licence != UNKNOWN
    return Component(
        name=material.name,
        version=material.version,
        purl=purl,
        bom_ref=str(purl),
        licenses=[LicenseFactory().make_from_string(material.licence)] if known else [],
        properties=[Property(name="coati-bench:locked-sha256", value=it) for it in material.sha256],
    )


def _licence_here(name: str, version: str) -> str:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
    same = found.version.partition("+")[0] == version.partition("+")[0]
    return licence_stated(HeaderParser().parsestr(found.read_text("METADATA") or "")) if same else UNKNOWN
