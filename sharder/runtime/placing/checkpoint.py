"""Checkpoints in safetensors files, in one file or in shards, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from shardwright.errors import ShardwrightError

__all__ = ["Checkpoint"]

_INDEX = ".safetensors.index.json"


class Checkpoint:
    """The tensors of a safetensors checkpoint, by name; a file is opened when its first tensor is asked for.

    Args:
        folder_or_file: a folder with ``model.safetensors``, with an index and its shards (Hugging Face's layout), or
            with any ``*.safetensors`` files, whose headers are then read; or one such file, or an index.

    Raises:
        ShardwrightError: there is no such file, a file or the index is damaged, the index names a file that is not
            there, two files hold a tensor of the same name, or safetensors is not installed.
    """

    def __init__(self, folder_or_file: str | Path) -> None:
        self.path = Path(folder_or_file)
        self._opened: dict[Path, Any] = {}
        _safetensors()
        self._file_of = self._located()
        self.names = frozenset(self._file_of)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; loading again opens them again. Tensors that were loaded are copies and stay."""
        for file in list(self._opened):
            self._close(file)

    def load(self, name: str, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        """Read the tensor ``name``, and no other, onto ``device``, as ``dtype`` if one is given.

        Raises:
            ShardwrightError: there is no such tensor, its file is damaged, or the device cannot take it.
        """
        stored = self._ask(name, "get_tensor")
        try:
            # The stored tensor is the mapped file itself: it would change with the file, and with its other readers.
            loaded: Tensor = stored.to(device=device, dtype=dtype, copy=True)
        except (RuntimeError, AssertionError) as error:
            size = stored.nbytes
            raise ShardwrightError(f"cannot put {name} ({size:,} bytes) on {device}: {_line(error)}") from error
        return loaded

    def mapped(self, name: str) -> Tensor:
        """The tensor ``name`` as the mapped file itself: read when it is used, not to be written.

        It keeps the file mapped after this checkpoint is closed.
        """
        tensor: Tensor = self._ask(name, "get_tensor")
        return tensor

    def find(self, name: str, aliases: Iterable[str] = ()) -> str | None:
        """The first of ``name`` and ``aliases``, the other names of a tied tensor, that is here; None without one."""
        return next((candidate for candidate in (name, *aliases) if candidate in self.names), None)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor ``name``, from the header of its file; errors as of :meth:`load`."""
        return tuple(self._ask(name, "get_slice").get_shape())

    def dtype(self, name: str) -> str:
        """The element type of the tensor ``name`` as safetensors calls it, such as ``BF16``; from the header too."""
        return str(self._ask(name, "get_slice").get_dtype())

    def _ask(self, name: str, question: str) -> Any:
        """What the method ``question`` of the tensor's file says of ``name``."""
        if name not in self._file_of:
            raise ShardwrightError(f"{self.path} has no tensor {name}; it has {len(self.names)} others")
        file = self._file_of[name]
        opened = self._open(file)
        try:
            return getattr(opened, question)(name)
        except _safetensors().SafetensorError as error:
            raise ShardwrightError(
                f"cannot read {name} from {file}: {_line(error)}; "
                "the checkpoint is damaged, or newer than your safetensors"
            ) from error

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = _safetensors().safe_open(file, framework="pt")
            except OSError as error:
                raise ShardwrightError(f"cannot read {file}: {_line(error)}") from error
            except _safetensors().SafetensorError as error:
                raise ShardwrightError(
                    f"{file} is damaged or incomplete ({_line(error)}); download it again"
                ) from error
        return self._opened[file]

    def _close(self, file: Path) -> None:
        if file in self._opened:
            self._opened.pop(file).__exit__(None, None, None)

    def _located(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it."""
        path = self.path
        if not path.exists():
            raise ShardwrightError(f"cannot read {path}: there is no such file or folder")
        if path.is_file():
            if path.name.endswith(_INDEX):
                return _read_index(path)
            if path.suffix == ".safetensors":
                return self._read_headers([path])
            raise ShardwrightError(f"{path} is not a safetensors file; {_SAVE}")
        files = sorted(path.glob("*.safetensors"))
        indices = sorted(path.glob(f"*{_INDEX}"))
        for one in (path / "model.safetensors", path / f"model{_INDEX}"):
            if one in files:
                return self._read_headers([one])
            if one in indices:
                return _read_index(one)
        if len(indices) > 1:
            raise ShardwrightError(f"{path} has {len(indices)} indices; give one of them, such as {indices[0]}")
        if indices:
            return _read_index(indices[0])
        if not files:
            raise ShardwrightError(f"{path} holds no *.safetensors file; {_SAVE}")
        return self._read_headers(files)

    def _read_headers(self, files: Sequence[Path]) -> dict[str, Path]:
        file_of: dict[str, Path] = {}
        for file in files:
            for name in self._open(file).keys():  # noqa: SIM118  # safe_open is no dictionary
                if name in file_of:
                    raise ShardwrightError(
                        f"{name} is in {file_of[name]} and in {file.name}, and no index says which is meant; "
                        "give one file, or a folder with one checkpoint"
                    )
                file_of[name] = file
        return file_of


_SAVE = "save the weights with safetensors.torch.save_model, or with save_pretrained"


def _read_index(path: Path) -> dict[str, Path]:
    """Tensor name -> file, as the ``weight_map`` of an index says."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        file_of = {str(name): path.parent / file for name, file in content["weight_map"].items()}
    except OSError as error:
        raise ShardwrightError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ShardwrightError(f"{path} is no index with a weight_map of names to files; download it again") from error
    absent = sorted({file.name for file in file_of.values() if not file.exists()})
    if absent:
        which = f"{absent[0]} that is" if len(absent) == 1 else f"{absent[0]} and {len(absent) - 1} more that are"
        raise ShardwrightError(f"{path} names {which} not there; download all shards")
    return file_of


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ShardwrightError(
            "reading a checkpoint needs safetensors, which is not installed: pip install 'shardwright[checkpoint]'"
        ) from error
    return safetensors


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
