"""Batches of a pipeline: whether they are like the sample, how they are divided, and outputs put together again."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardwright.errors import ShardwrightError, kind_of
from shardwright.profiler.profile import TensorSpec
from shardwright.profiler.recording.inputs import is_batched
from shardwright.profiler.recording.structure import Hole, copied, filled, map_tensors, tensors_in

__all__ = ["BatchForm", "Division", "OutputForm", "fingerprint", "pieces_of", "sampled"]

SAMPLED = 64
"""So many numbers of a parameter tell whether it was drawn alike."""


class Division(NamedTuple):
    """A batch as equal micro-batches."""

    pieces: int
    size: int
    """Samples in each."""


@dataclass(frozen=True)
class BatchForm:
    """How the model is called: all but the numbers, and the number of samples."""

    specs: tuple[TensorSpec, ...]
    """Of the sample's tensors, in order."""
    batched: tuple[bool, ...]
    """Which of them have the batch in their first dimension."""
    others: tuple[Any, ...]
    """What else the sample holds, which the capture has baked in."""
    keywords: tuple[str, ...]
    """Its keyword arguments, in order."""
    division: Division
    """The plan's."""
    replicas: int = 1
    """Which have equally many micro-batches each."""

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int, microbatches: int, replicas: int = 1
    ) -> Self:
        """The form of a sample of ``batch`` samples."""
        found = tensors_in((args, dict(kwargs)))
        return cls(
            specs=tuple(_spec(path, t) for path, t in found),
            batched=tuple(is_batched(t, batch) for _, t in found),
            others=_others(args, kwargs),
            keywords=tuple(kwargs),
            division=Division(microbatches, batch // microbatches),
            replicas=replicas,
        )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], int]:
        """The tensors of a call in the sample's order, and how many samples they hold.

        Raises:
            ShardwrightError: it is called otherwise than the sample, or tensors differ from it in more than the number
                of samples.
        """
        if set(kwargs) == set(self.keywords):
            kwargs = {name: kwargs[name] for name in self.keywords}
        found = tensors_in((args, dict(kwargs)))
        specs = [_spec(path, t) for path, t in found]
        batch = next((spec.shape[0] for spec, divided in zip(specs, self.batched, strict=False) if divided), 0)
        if specs != [_resized(spec, batch) if divided else spec for spec, divided in self._inputs()]:
            raise ShardwrightError(
                f"the pipeline was made for inputs {_listed(self.specs)}, with any number of samples; these are "
                f"{_listed(specs)}{_beside(args, kwargs)}: call it as its sample inputs were given"
            )
        empty = next((path for path, t in found if t.is_meta), None)
        if empty is not None:
            raise ShardwrightError(
                f"input {empty.partition(']')[2]} has no values (it is a meta tensor); give one that has"
            )
        if not batch:
            raise ShardwrightError(f"these inputs hold no samples ({_listed(specs)}); give one or more")
        if not _alike(_others(args, kwargs), self.others):
            raise ShardwrightError(
                "these inputs differ from the sample inputs in what is no tensor, which the pipeline has built in: "
                "make a pipeline with such inputs as its sample"
            )
        return [t for _, t in found], batch

    def divided(self, batch: int) -> Division:
        """How ``batch`` samples are divided: into micro-batches of the plan's size, or else as many as are equal.

        Raises:
            ShardwrightError: there are no equal parts for all replicas.
        """
        if batch % (self.division.size * self.replicas) == 0:
            return Division(batch // self.division.size, self.division.size)
        count = max(
            (n for n in range(self.replicas, self.division.pieces + 1, self.replicas) if not batch % n), default=0
        )
        if not count:
            raise ShardwrightError(
                f"a batch of {batch} samples has no equal parts for {self.replicas} replicas; leave out the last batch "
                f"(drop_last=True), or give one that {self.replicas} divides"
            )
        return Division(count, batch // count)

    def part(self, tensors: Sequence[Tensor], division: Division, replica: int) -> list[Tensor]:
        """What one replica has of a batch that is divided by ``division``, as views."""
        if self.replicas == 1:
            return list(tensors)
        rows = division.pieces // self.replicas * division.size
        return [
            t[replica * rows : (replica + 1) * rows] if divided else t
            for t, divided in zip(tensors, self.batched, strict=True)
        ]

    def _inputs(self) -> Iterator[tuple[TensorSpec, bool]]:
        yield from zip(self.specs, self.batched, strict=True)


def pieces_of(value: Any, batch: int, division: Division) -> list[Any]:
    """``value`` for each micro-batch, as views: tensors of ``batch`` samples are divided, all else goes to each."""

    def piece(tensor: Tensor, start: int) -> Tensor:
        return tensor[start : start + division.size] if is_batched(tensor, batch) else tensor

    starts = range(0, batch, division.size)
    return [map_tensors(lambda t, at=start: piece(t, at), value) for start in starts]  # type: ignore[misc]  # its own


class OutputForm:
    """What the model returns, with places for the tensors that come out of the pipeline.

    Args:
        output: of the captured forward.
        places: which of its tensors come out; the others are None.
        batched: which of those have the samples of a micro-batch in their first dimension.
    """

    def __init__(self, output: Any, places: Sequence[int], size: int) -> None:
        found = [t for _, t in tensors_in(output)]
        index = {id(t): i for i, t in enumerate(found)}
        self.count, self.places = len(found), tuple(places)
        self.template = copied(output, lambda t: Hole(index[id(t)]))
        self.batched = tuple(is_batched(found[place], size) for place in places)

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The model's result with ``tensors`` in it."""
        given: list[Any] = [None] * self.count
        for place, tensor in zip(self.places, tensors, strict=True):
            given[place] = tensor
        return filled(self.template, given)

    def joined(self, micro: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The tensors of the whole batch from those of its micro-batches.

        What does not grow with the batch is averaged if it is floating, as a loss is, and else that of the last.
        Their memory is as those make room that receive them.
        """
        made = []
        for divided, *parts in zip(self.batched, *micro, strict=True):
            if divided:
                made.append(torch.cat(parts))
            else:
                made.append(torch.stack(parts).mean(0) if parts[0].is_floating_point() else parts[-1])
        return [tensor.contiguous() for tensor in made]


def fingerprint(*values: Any) -> list[tuple[str, int]]:
    """A checksum of each dense tensor in ``values``, with its path: equal for equal batches."""
    return [
        (path, zlib.crc32(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()))
        for path, t in tensors_in(values)
        if t.layout == torch.strided
    ]


def sampled(model: nn.Module) -> int:
    """A checksum of some numbers of each parameter: equal for models that were drawn or loaded alike."""
    found = 0
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and not parameter.is_meta and parameter.is_contiguous():
            some = parameter.detach().view(-1)[:SAMPLED].cpu()
            found = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), found)
    return found


def _others(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    leaves = pytree.tree_leaves((args, dict(sorted(kwargs.items()))))
    return tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))


def _beside(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What there is beside tensors and plain values, such as arrays that were meant to be tensors."""
    plain = (str, bytes, int, float, complex, type(None))
    kinds = dict.fromkeys(kind_of(other) for other in _others(args, kwargs) if not isinstance(other, plain))
    return f" beside {' and '.join(kinds)}" if kinds else ""


def _alike(these: tuple[Any, ...], those: tuple[Any, ...]) -> bool:
    """Whether what is no tensor is the same; objects that hold some are compared by their class."""
    if len(these) != len(those):
        return False
    plain = (str, bytes, int, float, complex, type(None))
    return all(type(a) is type(b) and (not isinstance(a, plain) or a == b) for a, b in zip(these, those, strict=True))


def _resized(spec: TensorSpec, batch: int) -> TensorSpec:
    return TensorSpec(name=spec.name, dtype=spec.dtype, shape=(batch, *spec.shape[1:]))


def _spec(path: str, tensor: Tensor) -> TensorSpec:
    name, dtype = path.partition("]")[2], str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(name=name, dtype=dtype, shape=tuple(tensor.shape))


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec}" for spec in specs) or "(none)"
