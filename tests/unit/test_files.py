"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from bench import files
from bench.errors import MachineError, UserError
from bench.files import write_whole


def test_all_files_are_new_or_all_are_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, other = tmp_path / "a", tmp_path / "new" / "b"
    old.write_text("old")

    def full(path: Path, content: Any) -> None:
        if content == "much":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        path.write_text(content)

    with monkeypatch.context() as context:
        context.setattr(files, "_write", full)
        with pytest.raises(MachineError, match="No space left on device; what was there before is whole"):
            write_whole({old: "new", other: "much"})
    assert (old.read_text(), other.exists(), sorted(path.name for path in tmp_path.iterdir())) == ("old", False, ["a", "new"])
    write_whole({old: "new", other: b"much"})
    assert (old.read_text(), other.read_text()) == ("new", "much")


def test_a_link_leads_to_what_is_written_and_a_pipe_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole({tmp_path / "link": "text"})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole({tmp_path / "pipe": "through"})
    assert os.read(reader, 100) == b"through"
    os.close(reader)


def test_what_stands_in_the_way_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="seen: a file; the name of a folder would be right"):
        write_whole({tmp_path / "file" / "report.md": ""})
    with pytest.raises(UserError, match="seen: a folder; the name of a file would be right"):
        write_whole({tmp_path: ""})
