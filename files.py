"""Files that are never half-written, and records that are read back with one clear line when they are wrong."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from shardwright.errors import ShardwrightError

__all__ = ["Document", "Record", "said_of", "write_bytes", "write_text"]

LONG = 60
"""Longer values are not repeated in an error."""


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``; see :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write to ``path``: beside it first, then renamed, so that a reader sees the old file or the new one."""
    path = Path(path)
    beside = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with beside.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise ShardwrightError(f"cannot write {path}: {reason}; choose a folder that exists and is writable") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


class Record(BaseModel):
    """A frozen record of plain numbers in SI units."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Document(Record):
    """A record with a file of its own: versioned JSON, readable and diffable by a person."""

    kind: ClassVar[str]
    """What the file's ``format`` field says, such as ``shardwright.profile``."""
    current_version: ClassVar[int]
    """The version that this release writes; it reads no newer one."""
    remedy: ClassVar[str] = ""
    """What to do about a file that is wrong; by default, make it again."""

    format: str
    version: int

    def save(self, path: str | Path) -> None:
        """Write the document as JSON to ``path``, atomically."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a document from ``path``.

        Raises:
            ShardwrightError: the file is missing, truncated, of another kind, of a newer version, or has a wrong field.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ShardwrightError(f"cannot read {path}: {reason}") from error
        return cls.parse(text, source=str(path))

    @classmethod
    def parse(cls, text: str, *, source: str) -> Self:
        """Make a document from JSON ``text``; ``source`` names it in errors."""
        try:
            made = cls.model_validate_json(text)
        except ValidationError as error:
            raise ShardwrightError(cls._refusal(text, source, error)) from error
        if not made.model_fields_set >= {"format", "version"}:  # which have defaults for what is made, not read
            raise ShardwrightError(cls._refusal(text, source, None))
        return made

    @classmethod
    def _refusal(cls, text: str, source: str, error: ValidationError | None) -> str:
        """Why ``text`` is no such document: the first reason that a person would give.

        ``error`` is what is wrong beside its format and version, if anything is.
        """
        noun = cls.kind.rpartition(".")[2]
        again = cls.remedy or f"make the {noun} again"
        try:
            content: Any = json.loads(text)
        except ValueError as broken:
            return f"{source} is not complete JSON ({broken}); {again}"
        found = content.get("format") if isinstance(content, dict) else None
        if found != cls.kind:
            return f"{source} is not a {noun}: its format is {found!r}, expected {cls.kind!r}"
        version = content.get("version")
        if not isinstance(version, int) or version > cls.current_version:
            return (
                f"{source} has {noun} version {version!r}; this shardwright reads up to {cls.current_version}: "
                f"upgrade shardwright, or {again}"
            )
        assert error is not None, "format and version are as they should be"
        return f"{source} {cls.fault(error, content)}"

    @classmethod
    def fault(cls, error: ValidationError, content: Any) -> str:  # noqa: ARG003  # a subclass may look into it
        """The first thing that is wrong with a file's ``content``, as the end of a sentence about the file."""
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(top level)"
        return f"is a damaged {cls.kind.rpartition('.')[2]}: {where}: {said_of(first)}; make it again"


def said_of(error: Mapping[str, Any]) -> str:
    """What pydantic says is wrong with a field, with the value that it found there."""
    kind, limits = error["type"], error.get("ctx", {})
    if kind == "missing":
        return "it is missing"
    if kind == "too_short":
        return f"it has {limits['actual_length']}, and needs {limits['min_length']} or more"
    message = str(error["msg"]).removeprefix("Value error, ")
    found = error.get("input")
    shown = repr(found) if isinstance(found, (str, int, float)) else ""
    return (
        f"{message}, and it is {shown}"
        if kind not in ("value_error", "extra_forbidden") and 0 < len(shown) < LONG
        else message
    )
