"""Checkpoints over earlier ones: the old one is whole until the new one is.

``torch.distributed.checkpoint`` gives its data files the same names every time, and would write over those that the
old ``.metadata`` speaks of. Here each checkpoint has files of its own. The new ``.metadata``, written last and renamed
onto the old one, is what makes it the checkpoint of the folder; only then the files of the old one go, and no others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

__all__ = ["NewFiles"]


class _Replacing(FileSystem):
    """Files as ever, except that the old metadata is there until the new is renamed onto it."""

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Leave it: the writer removes nothing but the old metadata."""


class NewFiles(FileSystemWriter):
    """Writes a checkpoint beside the one that is in the folder, whose place it takes when it is whole."""

    def __init__(self, path: str | os.PathLike[str], thread_count: int) -> None:
        super().__init__(path, thread_count=thread_count)
        self.fs = _Replacing()

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Name the files of all ranks anew: ``__3f2a9c01__0_0.distcp``."""
        token = secrets.token_hex(4)

        def named(plan: SavePlan) -> SavePlan:
            prefix = f"__{token}{plan.storage_data.prefix}"
            return dataclasses.replace(plan, storage_data=dataclasses.replace(plan.storage_data, prefix=prefix))

        return [named(plan) for plan in super().prepare_global_plan(plans)]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, and remove the files that it does not speak of."""
        super().finish(metadata, results)
        own = {Path(result.storage_data.relative_path).name for each in results for result in each}
        for file in Path(self.path).glob("__*.distcp"):
            if file.name not in own:
                with contextlib.suppress(OSError):  # it is in nobody's way
                    file.unlink()
