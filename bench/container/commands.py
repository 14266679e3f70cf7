"""`coati-bench container ...`: one thin function a verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Pinned images: build, check and explain them; wheels for hosts without a network.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="IMAGE", help="An image of containers/images.toml: cpu, current, ...")]
Cache = Annotated[Path | None, typer.Option("--cache", help="Where images lie; by default the user's cache folder.")]


@app.command()
def build(
    name: Name = "current",
    archive: Annotated[
        bool, typer.Option("--archive", help="Write an OCI archive, too, for podman and docker; done anyway where one of them runs trials.")
    ] = False,
    commit: Annotated[bool, typer.Option("--commit", help="Write its digest into containers/digests.json.")] = False,
    output: Annotated[Path | None, typer.Option("--output", help="Write what was built as JSON.")] = None,
    any_package: Annotated[
        bool, typer.Option("--any-package", help="One whose package is another will do; trials bind this one over it.")
    ] = False,
    cache: Cache = None,
) -> None:
    """Build an image, or say that it is there. The same inputs give the same digest on every machine."""
    from bench.container.build import build as build_image
    from bench.container.build import commit_digest
    from bench.container.images import image_named
    from bench.container.runtimes import wants_archive
    from bench.container.verify import verify as verify_image
    from bench.record import write_json

    image = image_named(name)
    print(f"image {name}: {image.description}", flush=True)
    built = build_image(image, cache=cache, archive=archive or wants_archive(), any_package=any_package, new_rootfs=commit)
    if commit:
        commit_digest(built)
    print(f"digest: {built.digest}\nenvironment: {built.environment_digest}")
    if built.kernels is not None:
        print(f"kernels: {built.kernels.digest}")
    print(f"file: {built.squashfs} ({built.squashfs.stat().st_size / 1e6:,.0f} MB)")
    if built.archive is not None:
        print(f"archive: {built.archive} ({built.archive.stat().st_size / 1e6:,.0f} MB)")
    for problem in verify_image(image, built):
        print(f"note: {problem}")
    if output is not None:
        write_json(built.to_json(), output)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An image's file (.sqfs or .oci.tar); its .json lies beside it.")],
    cache: Cache = None,
) -> None:
    """Check an image's file against its note, its name and the committed digest, and what it holds; exit code 2 if it is another."""
    from bench.container.build import image_folder
    from bench.container.recomputed import recompute
    from bench.container.verify import check_committed, check_file

    note = check_file(file)
    check_committed(file, note)
    found = recompute(file, note, image_folder(cache))
    print(f"{file}: {note['image']}, {note['digest']}; its environment is the committed one ({note['environment_digest']})\n  {found}")


@app.command()
def check(
    name: Name = "cpu", cache: Cache = None, keep: Annotated[bool, typer.Option("--keep", help="Make the image of it, too.")] = False
) -> None:
    """Build an image's environment anew; exit code 2 if it is not the committed one. Prints SKIPPED: and why where it cannot be tried."""
    from bench.container.check import check_environment
    from bench.container.images import image_named

    print(check_environment(image_named(name), cache=cache, keep=keep))


@app.command()
def digest(name: Name = "current") -> None:
    """Print the committed digest of an image's environment."""
    from bench.container.images import committed, image_named
    from bench.errors import UserError

    before = committed(image_named(name).name)
    if before is None:
        raise UserError(f"image {name!r}: no digest is committed; `coati-bench container build {name} --commit` commits one")
    print(before["digest"])


@app.command()
def explain(name: Name = "current") -> None:
    """What decides an image, and what of that differs from the committed build. Builds nothing."""
    from bench.container.images import image_named
    from bench.container.verify import explain as explain_image

    print("\n".join(explain_image(image_named(name))))


@app.command(name="list")
def list_images(format: Annotated[str, typer.Option("--format", help="text or json.")] = "text") -> None:
    """The images, and which of them this machine's driver and devices can run."""
    from bench.container.fit import fit_lines, fits, fits_to_json

    if format == "json":
        print(json.dumps(fits_to_json(fits()), indent=2))
    else:
        print("\n".join(fit_lines()))


@app.command()
def wheelhouse(
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    image: Annotated[str, typer.Option("--image", help="Whose locks.")] = "current",
    python: Annotated[str, typer.Option("--python", help="Python version of the host.")] = "3.11",
    cache: Cache = None,
) -> None:
    """Every locked wheel, sources built, with hashes: for `pip install --no-index --find-links` on hosts without a network."""
    from bench.container.build import image_folder
    from bench.container.images import image_named
    from bench.container.wheelhouse import make_wheelhouse

    folder = image_folder(cache)
    folder.mkdir(parents=True, exist_ok=True)
    house = make_wheelhouse(image_named(image), output, python=python, cache=folder)
    total = sum(path.stat().st_size for path in house.iterdir())
    print(f"{house}: {len(list(house.glob('*.whl')))} wheels, {total / 1e6:,.0f} MB. On the host, in a virtual environment:")
    print(f"  python -m pip install --no-index --no-deps --require-hashes --find-links {house.name} -r {house.name}/requirements.txt")
    print("This package is none of them; with a copy of the checkout there:\n  PYTHONPATH=CHECKOUT python -m bench doctor")


@app.command()
def bill(
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="An image by name (from its locks), or its file (.sqfs; Debian's part, too).")
    ],
    licences: Annotated[bool, typer.Option("--licences", help="Print the table of licences instead.")] = False,
    output: Annotated[Path | None, typer.Option("--output", help="Write to this file.")] = None,
) -> None:
    """What an image is made of: a bill of materials (CycloneDX 1.6, JSON), or a table of licences."""
    from bench.container.bill_of_materials import cyclonedx, licence_table, of_file, of_locks
    from bench.container.images import image_named, images
    from bench.container.verify import check_file

    if image.endswith(".sqfs"):
        note = check_file(Path(image))
        materials, name, version = of_file(Path(image)), note["image"], note["digest"]
    else:
        materials, name, version = of_locks(image_named(image)), image, "locks"
    epoch = (images().get(name) or next(iter(images().values()))).epoch
    name = f"coati-bench-{name}"
    text = f"{licence_table(materials)}\n" if licences else cyclonedx(materials, name=name, version=version, epoch=epoch)
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")
        print(f"{output}: {len(materials)} packages")


@app.command()
def pyxis(
    trial: Annotated[Path, typer.Argument(metavar="TRIAL", help="A trial.json of a suite that ran with --container.")],
) -> None:
    """UNTESTED: print a trial's line for srun with Enroot and Pyxis, for an allocation whose first node is $HEAD."""
    from pydantic import ValidationError

    from bench.container.pyxis import WARNING, pyxis_line
    from bench.errors import UserError
    from bench.trial import load_trial

    try:
        loaded = load_trial(trial)
    except (OSError, ValueError, ValidationError) as error:
        seen = str(error).partition("\n")[0]
        raise UserError(f"{trial}: no trial; seen: {seen}; a trial.json below results/SUITE/logs/ would be right") from None
    print(f"# {WARNING}\n{pyxis_line(loaded, trial.absolute())}")
