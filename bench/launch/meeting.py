"""How the nodes of a trial that is typed by hand meet: one small file for each, in a folder that all of them share. Torch-free.

A file holds what its node says of itself and a beat that never stands still while the node's command lives. A reader believes a
file only after it has seen the beat move, by its own clock: what an earlier run left is never taken for a node, and no two clocks
have to agree. Files are written in place and read by opening them anew, which is what NFS keeps consistent.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

BEAT_SECONDS = 0.5
SILENT_SECONDS = 30.0
"""A beat that stands still for so long is taken for the end of that node's command."""

_BYTES = 2048
"""Length of a file, so that a write is never seen half done."""


class Beacon:
    """What this node says of itself, with a beat. A context manager; the file is left behind with its last words."""

    def __init__(self, path: Path, **words: Any) -> None:
        self._path, self._words, self._beat = path, {"session": uuid.uuid4().hex, **words}, 0
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def say(self, **words: Any) -> None:
        """Change some words, at once."""
        with self._lock:
            self._words.update(words)
        self._write()

    def _keep_beating(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._write()
            except OSError:
                continue  # readers see a beat that stands still, which is the truth

    def _write(self) -> None:
        with self._lock:
            self._beat += 1
            text = json.dumps({"beat": self._beat, **self._words}).encode().ljust(_BYTES)
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(file, text)
                os.ftruncate(file, len(text))
            finally:
                os.close(file)


class Sight:
    """What another node says of itself, as far as it can be believed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[Any, Any] | None = None
        self._moved: float | None = None
        self.words: dict[str, Any] = {}
        """Its last words; of an earlier run as long as `alive` was never true."""

    def look(self) -> Self:
        """Read the file."""
        try:
            words = json.loads(self._path.read_text(encoding="utf-8"))
            beat = (words["session"], words["beat"])
        except (OSError, ValueError, KeyError, TypeError):
            return self
        if beat != self._seen:
            same = self._seen is not None and self._seen[0] == beat[0]
            self._moved = time.monotonic() if same else None
            self._seen, self.words = beat, words
        return self

    @property
    def last_beat(self) -> float | None:
        """When its beat was last seen to move, by the monotonic clock; None for one that never was."""
        return self._moved

    @property
    def alive(self) -> bool:
        """Whether its beat moves."""
        return self._moved is not None and time.monotonic() - self._moved < SILENT_SECONDS
