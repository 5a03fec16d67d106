"""The cache of measurements: what was measured once on this machine is not measured again.

One small JSON file a measurement, named by the digest of its key. The key states everything that the time depends on:
what is computed, on which device, how it is measured, and by which PyTorch (see
:mod:`shardwright.profiler.measuring.signature`). Files are written beside and renamed, so that any number of processes
can share the folder, and one that cannot be read counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from shardwright.errors import ShardwrightError
from shardwright.files import Record, write_text

__all__ = ["FOLDER_VARIABLE", "Cache", "default_folder"]

FOLDER_VARIABLE = "SHARDWRIGHT_CACHE"
R = TypeVar("R", bound=Record)


def default_folder() -> Path:
    """``$SHARDWRIGHT_CACHE``, or ``shardwright`` in the user's folder for caches (XDG base directories)."""
    if FOLDER_VARIABLE in os.environ:
        return Path(os.environ[FOLDER_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardwright"


class Cache:
    """Records by key, in files and in memory.

    Args:
        folder: is made when the first record is written; None = the records are forgotten with this object.
        refresh: take nothing from the files, and replace what is there.
    """

    def __init__(self, folder: Path | None, *, refresh: bool = False) -> None:
        self.folder = folder
        self.refresh = refresh
        self.known: dict[str, Record] = {}
        """What this object has put or found."""

    def get(self, key: str, kind: type[R]) -> R | None:
        """The record of ``key``; None without one, or where its file is damaged or of another release."""
        if key in self.known:
            record = self.known[key]
            return record if isinstance(record, kind) else None
        if self.folder is None or self.refresh:
            return None
        try:
            content = json.loads(self._path(self.folder, key).read_text(encoding="utf-8"))
            found = kind.model_validate(content["record"]) if content["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None
        if found is not None:
            self.known[key] = found
        return found

    def put(self, key: str, record: Record) -> None:
        """Keep ``record``.

        Raises:
            ShardwrightError: the folder cannot be written.
        """
        self.known[key] = record
        if self.folder is None:
            return
        path = self._path(self.folder, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ShardwrightError(
                f"cannot keep measurements in {self.folder}: {error.strerror or error}; "
                f"set {FOLDER_VARIABLE} to a folder that can be written"
            ) from error
        content = {"key": key, "record": record.model_dump(mode="json")}
        write_text(path, json.dumps(content, indent=1) + "\n")

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return folder / digest[:2] / f"{digest[2:34]}.json"
