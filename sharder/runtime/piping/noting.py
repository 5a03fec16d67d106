"""Notes of a step: when a stage computed, waited for a message, and came to one.

The seam is where PyTorch's engine meets a stage: its schedules call the stage's ``forward_one_chunk`` and
``backward_one_chunk``, under zero-bubble ``backward_weight_one_chunk`` too, ask it for the operations of each message,
and post and await those through two functions of their module. While a step is noted these are wrapped, and afterwards
they are what they were; a step that is timed never meets a wrapper. The same names serve torch 2.11 and 2.13.

Times are of the host's ``time.perf_counter``, which all processes of one host share, so CPU workers need no offset. A
GPU runs behind its host: events are recorded on its stream, and one synchronisation before the step ties them to the
host's clock, to within the time that the synchronisation takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from shardwright.sharder.runtime.accounts import Mark, Noted
from shardwright.sharder.runtime.piping.parted_stage import PartedStage
from shardwright.sharder.runtime.piping.prompt_stage import PromptStage
from shardwright.sharder.runtime.record import What

__all__ = ["Clock", "HostClock", "Notes", "StreamClock"]

_MESSAGES: dict[str, What] = {
    "get_fwd_recv_ops": "receive activations",
    "get_fwd_send_ops": "send activations",
    "get_bwd_recv_ops": "receive gradients",
    "get_bwd_send_ops": "send gradients",
}


class _Label(NamedTuple):
    """What was done, for which micro-batch, on which of the device's stages."""

    what: What
    microbatch: int | None
    piece: int


class Clock(Protocol):
    """Tells moments, and afterwards their seconds."""

    def now(self) -> Any:
        """Mark the device's present moment."""

    def seconds(self, moment: Any) -> float:
        """Say when that was on the host's clock."""


class HostClock:
    """For a device that computes while the host waits."""

    def now(self) -> float:
        """Read the clock."""
        return time.perf_counter()

    def seconds(self, moment: float) -> float:
        """Return it as it is."""
        return moment


class StreamClock:
    """For a GPU: moments of its current stream, to be read after a synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.origin = self.now()
        torch.cuda.synchronize(device)
        self.origin_s = time.perf_counter()

    def now(self) -> torch.cuda.Event:
        """Mark when the stream has done what it was given so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, moment: torch.cuda.Event) -> float:
        """Say when that was on the host's clock, by its distance from the first moment."""
        return self.origin_s + float(self.origin.elapsed_time(moment)) / 1e3


class Notes:
    """The notes of one device in one step; its stages are numbered by their order, as pieces.

    Args:
        clock: by default that of ``device``.
    """

    def __init__(self, device: torch.device, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or (StreamClock(device) if device.type == "cuda" else HostClock())
        self._slots: list[tuple[_Label, Any, Any]] = []
        self._posts: dict[_Label, Any] = {}
        self._labels: dict[int, tuple[Any, _Label]] = {}
        """By identity, with the object, which stays alive until its label is read: no longer, for it holds tensors."""

    @contextmanager
    def slot(self, what: What, microbatch: int | None = None, piece: int = 0) -> Iterator[None]:
        """Note when the block begins and ends."""
        start = self.clock.now()
        try:
            yield
        finally:
            self._slots.append((_Label(what, microbatch, piece), start, self.clock.now()))

    def post(self, what: What, microbatch: int | None = None, piece: int = 0) -> None:
        """Note that the stage has come to a transfer; of one in several tensors, the first counts."""
        label = _Label(what, microbatch, piece)
        if label not in self._posts:
            self._posts[label] = self.clock.now()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The step itself."""
        self._start = self.clock.now()
        yield
        self._end = self.clock.now()

    def noted(self) -> Noted:
        """What was noted, after the device has done everything."""
        seconds = self.clock.seconds
        marks = [Mark(what, number, seconds(t), seconds(end), piece) for (what, number, piece), t, end in self._slots]
        posts = [
            Mark(what, number, seconds(at), seconds(at), piece) for (what, number, piece), at in self._posts.items()
        ]
        return Noted(
            start_s=seconds(self._start),
            end_s=seconds(self._end),
            marks=tuple(sorted(marks, key=lambda mark: mark.start_s)),
            posts=tuple(posts),
        )

    @contextmanager
    def engine(self, stages: Sequence[PromptStage], *, train: bool) -> Iterator[None]:
        """Note what the engine does with ``stages`` in this block."""
        with ExitStack() as wrapped:
            for piece, stage in enumerate(stages):
                self._wrap(wrapped, stage, "forward_one_chunk", partial(self._in_slot, "forward", piece))
                if train:  # without it the engine calls a backward that does nothing
                    self._wrap(wrapped, stage, "backward_one_chunk", partial(self._in_slot, "backward", piece))
                    if isinstance(stage, PartedStage):
                        weights = partial(self._in_slot, "backward of weights", piece)
                        self._wrap(wrapped, stage, "backward_weight_one_chunk", weights)
                for name, what in _MESSAGES.items():
                    self._wrap(wrapped, stage, name, partial(self._labelled, what, piece))
            prompt = any(stage.prompt for stage in stages)
            self._wrap(wrapped, schedules, "_batch_p2p", partial(self._posted, prompt=prompt))
            self._wrap(wrapped, schedules, "_wait_batch_p2p", lambda _call: self._await)
            yield

    def _wrap(self, wrapped: ExitStack, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Any]) -> None:
        """Set ``owner.name`` to a wrapper, and back when ``wrapped`` ends."""
        own = vars(owner).get(name)
        setattr(owner, name, wrap(getattr(owner, name)))
        wrapped.callback(delattr, owner, name) if own is None else wrapped.callback(setattr, owner, name, own)

    def _in_slot(self, what: What, piece: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(microbatch: int, *args: Any, **kwargs: Any) -> Any:
            with self.slot(what, microbatch, piece):
                return call(microbatch, *args, **kwargs)

        return noted

    def _labelled(
        self, what: What, piece: int, call: Callable[[int], list[dist.P2POp]]
    ) -> Callable[[int], list[dist.P2POp]]:
        def noted(microbatch: int) -> list[dist.P2POp]:
            operations = call(microbatch)
            self._label(operations, [_Label(what, microbatch, piece)] * len(operations))
            return operations

        return noted

    def _posted(self, call: Callable[..., list[dist.Work]], *, prompt: bool) -> Callable[..., list[dist.Work]]:
        """``call``, noted; of prompt stages, whose receives are posted ahead, a transfer begins with its send."""

        def noted(operations: list[dist.P2POp], *args: Any, **kwargs: Any) -> list[dist.Work]:
            # What the engine sends of its own accord, as when it sets itself up, is of no stage's message.
            labels = [label for each in operations if (label := self._label_of(each)) is not None]
            if len(labels) != len(operations):
                return call(operations, *args, **kwargs)
            sends = [label for label in labels if label.what.startswith("send")]
            for label in sends if prompt else labels:
                self.post(*label)
            with self.slot(*sends[0]) if sends and prompt else nullcontext():  # the call writes what is sent
                works = call(operations, *args, **kwargs)
            if len(works) != len(labels):
                # NCCL makes one of them all: who has to wait does so for what is to be received.
                last = next((label for label in labels if label.what.startswith("receive")), *labels[:1])
                labels = [last] * len(works)
            self._label(works, labels)
            return works

        return noted

    def _await(self, works: list[dist.Work]) -> None:
        for work in works:
            label = self._label_of(work)
            with self.slot(*label) if label else nullcontext():
                work.wait()

    def _label(self, objects: Sequence[Any], labels: Sequence[_Label]) -> None:
        self._labels |= {id(each): (each, label) for each, label in zip(objects, labels, strict=True)}

    def _label_of(self, found: Any) -> _Label | None:
        """What was noted of an object, once."""
        return self._labels.pop(id(found), (None, None))[1]
