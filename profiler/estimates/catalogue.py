"""The catalogue: what common devices and links can do at most, from ``catalogue.toml``, which gives the sources."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, ValidationError

from shardwright.errors import ShardwrightError
from shardwright.files import Record, said_of

__all__ = ["Catalogue", "DeviceModel", "Dtype", "LinkKind", "Rates", "catalogue", "model_of", "read_toml"]

_Model = TypeVar("_Model", bound=Record)

Dtype = Literal["float64", "float32", "tf32", "float16", "bfloat16", "float8", "int8"]


class Rates(Record):
    """What a device can do at most."""

    peak_flops: dict[Dtype, PositiveFloat] = Field(min_length=1)
    """Multiplications and additions a second, by the dtype that they are done in."""
    memory_bytes_per_s: PositiveFloat


class DeviceModel(Rates):
    """A device of the catalogue."""

    model: str
    names: tuple[str, ...] = Field(min_length=1)
    """Parts of the name that the driver gives it."""
    excludes: tuple[str, ...] = ()
    """What such a name must not have, or it is another model's."""
    memory: str
    host_link: str
    """The kind of link that joins it to its host."""
    source: str


class LinkKind(Record):
    """A link of the catalogue, in one direction."""

    kind: str
    latency_s: NonNegativeFloat
    bandwidth_bytes_per_s: PositiveFloat
    source: str


class Catalogue(Record):
    """Common devices and links, each with the source of its figures."""

    devices: tuple[DeviceModel, ...]
    links: tuple[LinkKind, ...]

    def device(self, model: str) -> DeviceModel | None:
        """The device of that name, however its letters and spaces are written."""
        return next((device for device in self.devices if _plain(device.model) == _plain(model)), None)

    def link(self, kind: str) -> LinkKind | None:
        """The link of that name, likewise."""
        return next((link for link in self.links if _plain(link.kind) == _plain(kind)), None)


@cache
def catalogue() -> Catalogue:
    """The catalogue that comes with shardwright."""
    return read_toml(Path(__file__).with_name("catalogue.toml"), Catalogue)


def model_of(description: str) -> DeviceModel | None:
    """The catalogue's model of a device, from the name that its driver gives it; None for one that is not there."""
    for device in catalogue().devices:
        fits = any(_has_word(description, name) for name in device.names)
        if fits and not any(_has_word(description, name) for name in device.excludes):
            return device
    return None


def read_toml(path: Path, kind: type[_Model]) -> _Model:
    """The content of a TOML file as a record.

    Raises:
        ShardwrightError: the file is missing, is no TOML, or has a key that is unknown, missing or wrong.
    """
    try:
        content: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ShardwrightError(f"cannot read {path}: {reason}; give a cluster file that exists") from error
    except tomllib.TOMLDecodeError as error:
        raise ShardwrightError(f"{path} is not TOML: {error}; mend that line") from error
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(top level)"
        message = said_of(first)
        if first["type"] == "extra_forbidden":
            message = f"there is no such key; the keys there are {', '.join(_keys(kind, first['loc'][:-1]))}"
        raise ShardwrightError(f"{path}: {where}: {message}") from error


def _keys(kind: type[BaseModel], where: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at ``where`` may have."""
    for part in where:
        if isinstance(part, str):
            annotation = kind.model_fields[part].annotation
            inner = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
            kind = inner[0] if inner else kind
    return list(kind.model_fields)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _has_word(text: str, words: str) -> bool:
    """Whether ``words`` stand in ``text`` as whole words, so that L4 is not found in L40."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(words)}(?![A-Za-z0-9])", text, re.IGNORECASE) is not None
