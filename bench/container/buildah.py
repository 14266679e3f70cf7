"""buildah's calls: a root file system that grows in a working container, its files as a layer and as a squashfs. Torch-free.

The container lies in the build's scratch folder, so that nothing of other images is touched and nothing of this one stays. It is not
committed: buildah would read, hash and copy gigabytes several times over, for minutes; one tar, hashed on its way, says the same.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.container.images import LAYER_OPTIONS
from bench.container.manifest import Content, Layer, write_layout, written_layer
from bench.container.tools import run

CONTAINERS_CONF = """[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
"""Limits that every machine can set."""
SMALL, QUICK = "-comp zstd -Xcompression-level 3", "-comp lz4 -no-fragments"
"""mksquashfs's options. What a program reads as it starts is unpacked at every mount: for that the second takes less than half of the
processor's time, in a file nearly half as large again.
"""
CONTAINER = "image"
OWNED_BY_ROOT = ("--owner=0", "--group=0")


class Tree(NamedTuple):
    """A root file system in a container of buildah's, whose store is a folder of its own."""

    folder: Path
    epoch: int
    """Time of everything in it as a layer and as a squashfs, seconds since 1970."""

    @classmethod
    def made(cls, folder: Path, epoch: int) -> Tree:
        """None yet, in a new `folder`; it begins with `unpack`."""
        folder.mkdir()
        (folder / "containers.conf").write_text(CONTAINERS_CONF, encoding="utf-8")
        (folder / "tmp").mkdir()
        return cls(folder, epoch)

    @property
    def program(self) -> list[str]:
        """buildah, told where its store is."""
        return ["buildah", "--root", str(self.folder / "images"), "--runroot", str(self.folder / "run")]

    @property
    def environment(self) -> dict[str, str]:
        """For its calls."""
        return {"CONTAINERS_CONF": str(self.folder / "containers.conf"), "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self.folder / "tmp")}

    def within(self, script: str, *arguments: str) -> list[str]:
        """The command that runs a script outside of the container, with its files in `$root` and their owners as they are inside."""
        prefix = [] if os.geteuid() == 0 else [*self.program, "unshare"]
        mount = shlex.join([*self.program, "mount", CONTAINER])
        return [*prefix, "sh", "-c", f"root=$({mount}) || exit; {script}", "sh", *arguments]

    def unpack(self, rootfs: Path) -> None:
        """Begin with a root file system, which is a tar."""
        run([*self.program, "from", "--name", CONTAINER, "scratch"], environment=self.environment)
        script = self.within('tar -xpf "$1" -C "$root" --numeric-owner', str(rootfs))
        run(script, what=f"unpacking {rootfs.name}", environment=self.environment)

    def run(self, command: Sequence[str], mounts: Mapping[Path, str], *, what: str, variables: Mapping[str, str] | None = None) -> None:
        """Run a command as root inside, without a network; `mounts` says where folders lie meanwhile ("/x", or "/x:ro")."""
        options = [f"--volume={folder}:{place}" for folder, place in mounts.items()]
        options += [f"--env={key}={value}" for key, value in (variables or {}).items()]
        run([*self.program, "run", "--network", "none", *options, CONTAINER, "--", *command], what=what, environment=self.environment)
        places = [place.removesuffix(":ro") for place in mounts.values()]
        run(self.within('for place; do rmdir "$root$place" || exit; done', *places), environment=self.environment)

    def add(self, folder: Path) -> None:
        """Lay the files of a folder over it."""
        run(self.within('cp -a "$1/." "$root"', str(folder)), environment=self.environment)

    def layer(self, into: Path | None = None) -> Layer:
        """All of it as a layer, kept in a file if one is given."""
        script = f'tar {shlex.join(tar_options(self.epoch))} -C "$root" -cf - .'
        return written_layer(self.within(script), self.environment, into)

    def layer_of(self, folder: Path, into: Path | None = None) -> Layer:
        """The files of a folder as a layer, all owned by root."""
        return written_layer(["tar", *tar_options(self.epoch), *OWNED_BY_ROOT, "-C", str(folder), "-cf", "-", "."], {}, into)

    def write_squashfs(self, squashfs: Path, packing: str) -> None:
        """Its files as a squashfs, which Apptainer runs as it is; `packing` is `SMALL` or `QUICK`."""
        times = f"-all-time {self.epoch} -mkfs-time {self.epoch}"
        script = f'env -u SOURCE_DATE_EPOCH mksquashfs "$root" "$1" -noappend {packing} {times} -no-progress -quiet'
        run(self.within(script, str(squashfs)), what=squashfs.name, environment=self.environment)

    def write_archive(self, content: Content, package: Path, name: str, archive: Path) -> None:
        """An OCI archive of two layers, it and the folder `package`, under the name `name`: the same bytes for the same image."""
        layout = self.folder / "layout"
        layout.mkdir()
        layers = [layout / "environment.tar", layout / "package.tar"]
        self.layer(layers[0])
        self.layer_of(package, layers[1])
        write_layout(layout, content, layers, name)
        options = [*tar_options(self.epoch), *OWNED_BY_ROOT, "--mode=a=rX,u+w"]
        run(["tar", *options, "-C", str(layout), "-cf", str(archive), "blobs", "index.json", "oci-layout"], what=archive.name)
        shutil.rmtree(layout)


def tar_options(epoch: int) -> list[str]:
    """What makes a tar the same bytes for the same files."""
    return [*LAYER_OPTIONS, f"--mtime=@{epoch}"]
