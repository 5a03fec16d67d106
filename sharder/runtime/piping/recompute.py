"""Stages that are computed anew: of a micro-batch in flight they keep what they receive, and make the rest again.

``torch.utils.checkpoint`` without reentrance does that (Chen et al., "Training deep nets with sublinear memory cost",
2016, with one segment a stage). What is left to do is that the second forward be the same as the first:

- The random numbers are those of the first forward. The CPU's generator is one for all threads of a process, so a stage
  that draws from it computes while no other stage does that draws too, forward and anew; checkpoint's own copy of the
  state knows no such turns.
- Batch statistics are updated by the first forward alone: what the second one does to them is undone.
- A stage that changes anything else that it reads, an input or a buffer, would compute something else the second time:
  it is refused by name in the first forward. What changes without autograd's knowledge is found there too, by values;
  whether the stage reads it is found by computing once more. What begins to change so later is not found.

Without gradients nothing is kept anyway, and the stage computes as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.equality import relative_difference, same_values, tolerance
from shardwright.profiler.recording.structure import tensors_in
from shardwright.sharder.runtime.piping.randomness import RandomState

__all__ = ["Recomputation", "RecomputedStage", "Turns"]

_ONE_AT_A_TIME = threading.RLock()


class Turns:
    """The turns of one stage among those that draw random numbers.

    Args:
        device: whose generator the stage draws from, beside the CPU's.
        shared: whether other stages compute in this process. The first turn then tells whether the stage draws at all;
            one that does not needs no turn any more, until a number that its modules hold has changed, such as a
            dropout's rate. What it draws for other reasons, and not in that turn, is not foreseen.
        modules: that compute in it.
    """

    def __init__(self, device: torch.device, *, shared: bool, modules: Iterable[nn.Module] = ()) -> None:
        self.device = device
        self.draws = True
        self.is_kept = False
        """By a backward, whose parts need no turn of their own."""
        self._known = not shared
        self._held = [vars(inner) for module in modules for inner in module.modules()]
        self._numbers: list[float] = []

    @contextmanager
    def taken(self) -> Iterator[RandomState | None]:
        """A turn, with the state in which it begins; None for a stage that draws nothing."""
        numbers = [value for held in self._held for value in held.values() if type(value) in (int, float)]
        if numbers != self._numbers:
            self.draws, self._known, self._numbers = True, False, numbers
        if not self.draws:
            yield None
            return
        with _ONE_AT_A_TIME:
            state = RandomState.of(self.device)
            yield state
            if not self._known:
                self.draws, self._known = not state.is_current(), True

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A turn for a whole backward, in whichever threads it runs: those of a GPU's are PyTorch's. It tells nothing
        of whether the stage draws, as what draws in a backward leaves the generators as they were.
        """
        if not self.draws:
            yield
            return
        with _ONE_AT_A_TIME:
            self.is_kept = True
            try:
                yield
            finally:
                self.is_kept = False


class Recomputation:
    """How one stage is computed anew.

    Args:
        name: the stage in words, for errors.
        modules: what computes in it, by name in the model.
        buffers: further tensors that it reads and might change, by name, as they are now.
        turns: its own.
    """

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        turns: Turns,
        buffers: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        self.name, self.turns = name, turns
        self._modules, self._more = dict(modules), buffers
        self._silent: set[str] | None = None
        """Buffers that change while their version does not, as kernels of batch normalisation do it; None = not yet
        known."""

    def __call__(self, run: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        """``run(*inputs)``, which keeps nothing else for its backward.

        Raises:
            ShardwrightError: it changes an input, or a buffer other than the statistics of batch normalisation.
        """
        if not torch.is_grad_enabled():
            return run(*inputs)
        buffers = self._buffers()
        versions = [t._version for t in inputs], {name: t._version for name, t in buffers.items()}
        before = {name: t.detach().clone() for name, t in buffers.items()} if self._silent is None else {}
        with self.turns.taken() as state:
            again = _Again(self, state)
            made = checkpoint(
                run,
                *inputs,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), again),
            )
            self._refuse_changes(inputs, buffers, *versions)
            if self._silent is None:
                self._silent = {name for name, t in buffers.items() if not same_values(before[name], t)}
                self._refuse_read(run, inputs, made, again)
        return made

    def _buffers(self) -> dict[str, Tensor]:
        """What the stage reads and might change, but for the statistics of norms."""
        norms = {id(t) for t in self._statistics_of_norms()}
        found = dict(self._more())
        for path, module in self._modules.items():
            found |= {f"{path}.{name}" if path else name: t for name, t in module.named_buffers()}
        return {name: t for name, t in found.items() if id(t) not in norms}

    def _statistics_of_norms(self) -> list[Tensor]:
        """Those that a forward updates now; in training its results do not depend on them."""
        norms = (m for module in self._modules.values() for m in module.modules())
        return [t for m in norms if isinstance(m, nn.modules.batchnorm._NormBase) and m.training for t in m.buffers()]

    def statistics(self) -> list[Tensor]:
        """What a second forward updates once too often."""
        silent = self._silent or set()
        return [*self._statistics_of_norms(), *(t for name, t in self._buffers().items() if name in silent)]

    def _refuse_changes(
        self, inputs: Sequence[Tensor], buffers: Mapping[str, Tensor], read: list[int], held: Mapping[str, int]
    ) -> None:
        changed = [
            *(f"input {i}" for i, (t, v) in enumerate(zip(inputs, read, strict=True)) if t._version != v),
            *(f"buffer {name}" for name, t in buffers.items() if t._version != held[name]),
        ]
        if changed:
            raise self._refusal(changed[0])

    def _refuse_read(self, run: Callable[..., Any], inputs: Sequence[Tensor], made: Any, again: _Again) -> None:
        """Refuse what changes silently where the results show that it is read, unlike the statistics of a norm."""
        if not self._silent:
            return
        with again, torch.no_grad():
            repeated = run(*inputs)
        pairs = zip(tensors_in(made), tensors_in(repeated), strict=True)
        if any(relative_difference(one, other) > tolerance(one.dtype) for (_, one), (_, other) in pairs):
            raise self._refusal(f"buffer {min(self._silent)}")

    def _refusal(self, what: str) -> ShardwrightError:
        return ShardwrightError(
            f"{self.name} changes its {what} in its forward, so that computing it anew in the backward would give "
            "something else: plan with recompute='never' (--recompute never)"
        )


class _Again:
    """Around the second forward of one micro-batch; it may be entered again for a further backward."""

    def __init__(self, of: Recomputation, state: RandomState | None) -> None:
        self.of, self.state = of, state

    def __enter__(self) -> None:
        self.takes_turn = self.state is not None and not self.of.turns.is_kept
        if self.takes_turn:
            _ONE_AT_A_TIME.acquire()
        try:
            if self.state is not None:
                self.before = RandomState.of(self.state.device)
                self.state.restore()
            self.kept = [(t, t.detach().clone()) for t in self.of.statistics()]
        except BaseException:  # such as out of memory, after which the other stages go on
            if self.takes_turn:
                _ONE_AT_A_TIME.release()
            raise

    def __exit__(self, *_error: object) -> None:
        # The statistics' own versions stay: autograd has saved them for a backward that does not read their values.
        try:
            for tensor, value in self.kept:
                tensor.data.copy_(value)
            self.kept = []
            if self.state is not None:
                self.before.restore()
        finally:
            if self.takes_turn:
                _ONE_AT_A_TIME.release()


class RecomputedStage(nn.Module):
    """A stage as a module, computed anew in the backward; ``stage`` is the module as it was, with its own names."""

    def __init__(self, module: nn.Module, index: int, device: torch.device) -> None:
        super().__init__()
        self.stage = module
        self._anew = Recomputation(f"stage {index} on {device}", {"": module}, Turns(device, shared=False))

    def forward(self, *inputs: Tensor) -> Any:
        """What ``stage`` gives."""
        return self._anew(self.stage, inputs)
