"""A device's part of the model's state, under the names that it has in the whole model, and that of its optimizer.

A checkpoint of a pipeline therefore holds what a checkpoint of the model holds, whichever way it was divided:
``torch.distributed.checkpoint`` stores each tensor once, and reads what is asked for. The optimizer's state has the
flattened names of ``torch.distributed.checkpoint.state_dict`` with ``flatten_optimizer_state_dict=True``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from shardwright.errors import ShardwrightError
from shardwright.profiler.workers.worker import root_of
from shardwright.sharder.runtime.piping.cut import StageProgram
from shardwright.sharder.runtime.piping.engine import SharedParameter, names_by_tensor
from shardwright.sharder.runtime.piping.ranks import Ranks
from shardwright.sharder.runtime.piping.stages import held_tensors
from shardwright.sharder.runtime.placing.newfiles import NewFiles

__all__ = ["StageState", "load_checkpoint", "save_checkpoint"]

EXTRA = "_extra_state"
"""How PyTorch ends the name of what a module saves beside its tensors."""


class StageState:
    """Which device holds what of a model, and this one's part of it.

    Args:
        model: whole, with its values.
        saved: the keys of its state.
        programs: of all stages, which go around ``devices`` devices.
        module: this device's, which is made of the model's own units.
        position: this device's.
        keeps_unused: whether it keeps what no stage uses, if it is the first device; one replica does.
    """

    def __init__(
        self,
        model: nn.Module,
        saved: Sequence[str],
        programs: Sequence[StageProgram],
        module: nn.Module,
        position: int,
        devices: int,
        *,
        keeps_unused: bool = True,
    ) -> None:
        self.module, self.position = module, position
        present = model.state_dict(keep_vars=True)
        whole = {key: present[key] for key in saved}
        shares = [programs[first::devices] for first in range(devices)]
        held = [set[int]().union(*map(held_tensors, share)) for share in shares]
        self.holders = {key: _holders(key, value, shares, held) for key, value in whole.items()}
        self.forms = {key: torch.empty_like(t, device="meta") for key, t in whole.items() if isinstance(t, Tensor)}
        own = {id(t): name for name, t in reversed(module.state_dict(keep_vars=True).items()) if isinstance(t, Tensor)}
        self._own = {key: own.get(id(value), key) for key, value in whole.items() if position in self.holders[key]}
        # What no step uses is nobody's; it belongs to the model all the same, and stays with the first device.
        keeps = keeps_unused and position == 0
        self.unused = {key: t for key, t in whole.items() if not self.holders[key]} if keeps else {}
        names = names_by_tensor(model)
        first = {id(p): name for name, p in model.named_parameters()}
        self._first_name = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        self.shared = tuple(
            SharedParameter(frozenset(names[id(p)]), holders)
            for _, p in model.named_parameters()
            if len(holders := tuple(i for i, tensors in enumerate(held) if id(p) in tensors)) > 1
        )
        self.copies = {key: holders for key, holders in self.holders.items() if len(holders) > 1 and key in self.forms}

    def tensors(self, *, themselves: bool = False) -> dict[str, Any]:
        """The stage's part: detached tensors, or ``themselves``, as sparse ones have to be written."""
        present = self.module.state_dict(keep_vars=themselves)
        return {key: present[name] for key, name in self._own.items()} | self.unused

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The stage's parameters under their first names in the model, each once."""
        for name, parameter in self.module.named_parameters():
            yield self._first_name.get(name, name), parameter

    def owned(self) -> list[nn.Parameter]:
        """Those of this stage's parameters that no earlier device holds too."""
        later = {name for tie in self.shared if tie.holders[0] != self.position for name in tie.names}
        return [parameter for name, parameter in self.parameters() if name not in later]

    def load(self, state: Mapping[str, Any]) -> None:
        """Take this stage's part from ``state``, which may hold the others' too.

        Raises:
            ShardwrightError: a part of this stage is missing or has another shape, or ``state`` has what the model has
                not.
        """
        foreign = next((key for key in state if key not in self.holders), None)
        missing = next((key for key in (*self._own, *self.unused) if key not in state), None)
        if foreign is not None or missing is not None:
            what = f"has no {missing}" if missing is not None else f"has {foreign}, which the model has not"
            raise ShardwrightError(f"the state {what}: it is not of this model; give that of the same model")
        for key in (*self._own, *self.unused):
            form = self.forms.get(key)
            if form is not None and form.shape != state[key].shape:
                raise ShardwrightError(
                    f"{key} has shape {tuple(state[key].shape)} in the state and {tuple(form.shape)} in the model; "
                    "give the state of the same model"
                )
        self.module.load_state_dict({name: state[key] for key, name in self._own.items()}, strict=False)
        with torch.no_grad():
            for key, value in self.unused.items():
                if isinstance(value, Tensor):
                    value.copy_(state[key])

    def gather(self, ranks: Ranks) -> dict[str, Any]:
        """The whole model's state, that of the first replica, in the host's memory on rank 0; nothing on the others."""
        mine = self.tensors()
        found: dict[str, Any] = {}
        for key, holders in self.holders.items():
            source = holders[0] if holders else 0
            if key in self.forms:
                tensor = mine[key].cpu() if source == ranks.rank else None
                carried = ranks.carry(tensor, self.forms[key], source, 0)
            else:
                carried = ranks.share(mine.get(key), source)
            if ranks.rank == 0:
                found[key] = carried
        return found

    def scatter(self, state: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
        """The stage's part of the whole model's state that rank 0 gives; the first replica alone gets tensors.

        Raises:
            ShardwrightError: rank 0's is not of this model; on every rank.
        """
        keys = ranks.share(list(state) if ranks.rank == 0 else None, 0)
        absent = next((key for key in self.holders if key not in keys), None)
        if absent is not None:
            raise ShardwrightError(f"the state on rank 0 has no {absent}: it is not of this model, or not whole")
        mine: dict[str, Any] = {}
        for key, holders in self.holders.items():
            for target in holders or (0,):
                if key in self.forms:
                    value = state[key].cpu().to(self.forms[key].dtype) if ranks.rank == 0 else None
                    carried, here = ranks.carry(value, self.forms[key], 0, target), target == ranks.rank
                else:
                    carried, here = ranks.share(state.get(key), 0), target == ranks.position
                if here:
                    mine[key] = carried
        return mine

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's state by the parameters' names in the model, flattened.

        Raises:
            ShardwrightError: the optimizer has a parameter that is not this stage's.
        """
        found: dict[str, Any] = {}
        for group, named in self._groups(optimizer):
            for name, parameter in named:
                found |= {f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"}
                found |= {f"state.{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
        return found

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Give ``optimizer`` the state of its parameters; those of other stages may be there too.

        Settings of a group are those of its first parameter.

        Raises:
            ShardwrightError: there is none for one of its parameters.
        """
        states: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        position = 0
        by_name = _by_name(state)
        for group, named in self._groups(optimizer):
            settings = {key: value for key, value in group.items() if key != "params"}
            for order, (name, _) in enumerate(named):
                if name not in by_name["param_groups"]:
                    raise ShardwrightError(
                        f"the optimizer's state has nothing for {name}: it is of another model, or of an optimizer "
                        "over other parameters"
                    )
                settings |= by_name["param_groups"][name] if order == 0 else {}
                states[position + order] = by_name["state"].get(name, {})
            groups.append(settings | {"params": list(range(position, position + len(named)))})
            position += len(named)
        optimizer.load_state_dict({"state": {i: s for i, s in states.items() if s}, "param_groups": groups})

    def _groups(
        self, optimizer: torch.optim.Optimizer
    ) -> Iterator[tuple[dict[str, Any], list[tuple[str, nn.Parameter]]]]:
        name_of = {id(parameter): name for name, parameter in self.parameters()}
        for group in optimizer.param_groups:
            if any(id(parameter) not in name_of for parameter in group["params"]):
                raise ShardwrightError(
                    "the optimizer has a parameter that this stage has not; make it over pipe.parameters()"
                )
            yield group, [(name_of[id(parameter)], parameter) for parameter in group["params"]]


def _holders(
    key: str, value: Any, shares: Sequence[Sequence[StageProgram]], held: Sequence[set[int]]
) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return tuple(position for position, tensors in enumerate(held) if id(value) in tensors)
    path = key.removesuffix(EXTRA).rstrip(".")
    return tuple(
        position
        for position, share in enumerate(shares)
        if any(
            path == name or path.startswith(f"{name}.")
            for program in share
            for name, unit in program.attributes.items()
            if isinstance(unit, nn.Module)
        )
    )


def _by_name(state: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """A flattened state as section -> parameter -> key -> value."""
    found: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for flat, value in state.items():
        section, _, rest = flat.partition(".")
        name, _, key = rest.rpartition(".")
        found.setdefault(section, {}).setdefault(name, {})[key] = value
    return found


def save_checkpoint(
    folder: str | Path, state: StageState, ranks: Ranks, optimizer: torch.optim.Optimizer | None
) -> None:
    """Write all stages' parts into ``folder``, each tensor once; see :class:`NewFiles`.

    Raises:
        ShardwrightError: that is not possible; an earlier checkpoint there is as it was.
    """
    parts: dict[str, Any] = {} if ranks.replica else {"model": state.tensors()}  # the others' are the same
    if optimizer is not None and not ranks.replica:
        parts["optimizer"] = state.optimizer_state(optimizer)
    # One thread alone looks for an accelerator's streams, and would take simulated devices for one.
    writer = NewFiles(folder, thread_count=1 if ranks.device.type == "cuda" else 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected an existing checkpoint")  # which is taken care of
        with _told(f"cannot write the checkpoint into {folder}"):
            save(parts, storage_writer=writer, process_group=ranks.control)


def load_checkpoint(
    folder: str | Path, state: StageState, ranks: Ranks, optimizer: torch.optim.Optimizer | None
) -> None:
    """Read this stage's part from ``folder``, and the optimizer's.

    Raises:
        ShardwrightError: there is no checkpoint, it cannot be read, or it is not of this model.
    """
    stored = _stored(folder)
    parts: dict[str, Any] = {"model": {}}
    for key, value in state.tensors().items():
        if f"model.{key}" not in stored:
            raise ShardwrightError(f"the checkpoint in {folder} has no {key}: it is not of this model")
        parts["model"][key] = torch.empty_like(value) if isinstance(value, Tensor) else value
    if optimizer is not None:
        parts["optimizer"] = _optimizer_forms(stored, state)
    with _told(f"cannot read the checkpoint in {folder}"):
        load(parts, checkpoint_id=folder, process_group=ranks.control)
    state.load(parts["model"])
    if optimizer is not None:
        state.load_optimizer(optimizer, parts["optimizer"])


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Say in one line what failed on which rank: PyTorch's exception is no ``Exception``, and holds tracebacks."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise ShardwrightError(f"{what}: rank {rank}: {root_of(cause)}") from error


def _stored(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, without reading it."""
    try:
        return dict(FileSystemReader(folder).read_metadata().state_dict_metadata)
    except OSError as error:
        raise ShardwrightError(f"there is no checkpoint in {folder}: {error.strerror or error}") from error


def _optimizer_forms(stored: Mapping[str, Any], state: StageState) -> dict[str, Any]:
    """Room for what a checkpoint holds of this stage's optimizer."""
    names = {name for name, _ in state.parameters()}
    flat = {key.removeprefix("optimizer."): form for key, form in stored.items() if key.startswith("optimizer.")}
    mine = {key: form for key, form in flat.items() if key.partition(".")[2].rpartition(".")[0] in names}
    return {
        key: torch.empty(form.size, dtype=form.properties.dtype) if hasattr(form, "size") else None
        for key, form in mine.items()
    }
