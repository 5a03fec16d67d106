"""The memory that a micro-batch takes on its way forward and back through the nodes of a stage.

Before node i of the forward are held: what the nodes before keep for their backward, and each storage between nodes
that a later one still reads. The backward takes the nodes in reverse; before node i are held: what the nodes up to i
keep, and each gradient that a node behind has made and its maker, or another user of the same weights, still waits for.

    forward  = max over i of  held before i forward  + what i takes beyond it
    backward = max over i of  held before i backward + what i takes beyond it
    kept     = held when the forward is done

In the first backward of a step the gradients of the parameters are not there yet: each is there from the end of its
node's backward, as far as nodes tell (a node of several layers makes some of them earlier):

    first    = max over i of  held before i backward + what i takes beyond it + gradients of the nodes behind i

A stage that is computed anew lets go of all but what it receives and what it has sent. When the backward comes to the
last node that saves anything, its forward is run again and keeps what nodes save, but not what is sent unless a node
saves that too:

    forward  = max over i of  storages between nodes held before i + what i takes beyond it
    backward = sent + max over i of  gradients that wait before i, from that node on what the nodes up to i keep, and
                                     what i takes beyond it, or there the peak of the forward that is run again
    kept     = sent

A maximum over nodes is no sum: the peak of a union of blocks does not follow from the peaks of the blocks. So the
search asks for the walk through each stage that a bound by sums does not settle, and the plan reports the same number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

__all__ = ["EMPTY", "Gradient", "Ledger", "Step", "Storage", "Walk", "bits", "engine_bytes"]


def bits(mask: int) -> Iterator[int]:
    """The positions of the ones in ``mask``."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


class Step(NamedTuple):
    """One node; bytes of one micro-batch."""

    block: int
    saved: int
    """Kept from its forward until its backward is done."""
    forward: int
    """The most that its forward takes beyond what is held before it, what it leaves included."""
    backward: int
    """The most that its backward takes beyond what is held before it."""
    update: int = 0
    """The most that the optimizer takes for its parameters, one after another."""
    update_left: int = 0
    """What that still holds when the next node's turn begins."""
    update_together: int = 0
    """What the optimizer takes for them where it works on all parameters of a device at once."""
    deferred: int = 0
    """Held from the first part of its backward to the second, beside what it saved."""
    gradient: int = 0
    """Of its parameters: there from the first backward of a step until the next step."""


class Storage(NamedTuple):
    """Memory that a node makes and others read; nodes are given by position."""

    size: int
    maker: int
    readers: tuple[int, ...]
    """In order; those of all tensors that have it."""
    saver: int | None = None
    """The node whose ``saved`` has it in."""
    returned: bool = False
    """The model returns it, so that it is held until the backward is done."""


class Gradient(NamedTuple):
    """A gradient that waits: from the backward of its last reader to that of its maker, or of the first reader."""

    size: int
    readers: tuple[int, ...]
    """In order: the nodes whose backward makes it or adds to it."""
    maker: int | None
    """None: weights, whose gradient waits for the first of their users."""
    added: int
    """Each reader but the last makes a sum of so many bytes, while autograd still holds what is added."""


class Walk(NamedTuple):
    """Bytes that a micro-batch takes on its way, and the optimizer after it."""

    kept: int
    forward: int
    backward: int
    update: int
    """Of the optimizer, or of the sum of gradients over replicas before it if that takes more."""
    update_together: int
    """Likewise, if it works on all parameters at once."""
    first: int
    """The peak of a step's first backward; that of the others, ``backward``, has the parameters' gradients apart."""
    gradients: int
    """Of the parameters, when all are made."""
    sent: int
    """Of what is kept, the storages that later stages read or the model returns."""
    deferred: int = 0
    """Held from the first part of the backward to the second, beside what is kept."""
    parted: int = 0
    """The peak of either part, in which nothing that is kept goes."""


class _Part(NamedTuple):
    """What a ledger has of one block."""

    steps: list[int]
    storages: list[int]
    gradients: list[int]
    made: list[int]
    """Of the storages, those that its nodes make."""


_Bytes = defaultdict[int, int]
"""By position of a node."""


@dataclass(frozen=True)
class Ledger:
    """The nodes in the order of the forward, and what is held between them."""

    steps: tuple[Step, ...]
    storages: tuple[Storage, ...] = ()
    gradients: tuple[Gradient, ...] = ()
    copied: int = 0
    """Gradients that are to be summed over replicas are copied, before the update, so many bytes at once at most."""

    def walk(self, members: int) -> Walk:
        """Walk through the stage of the blocks in the bit mask ``members``, and back.

        What the stage receives is left out. What it sends stays until the backward is done.
        """
        inside = set(bits(members))
        mine = self._positions(inside)
        ahead, back, sums, waits = self._changes(inside, mine, leaves=True)
        kept, forward = self._there(mine, ahead)
        held = backward = first = parted = kept
        made = waiting = deferred = 0
        for position in reversed(mine):
            peak = held + self.steps[position].backward + sums[position]
            backward, first = max(backward, peak), max(first, peak + made)
            parted = max(parted, kept + deferred + waiting + self.steps[position].backward + sums[position])
            held += back[position]
            waiting += waits[position]
            deferred += self.steps[position].deferred
            made += self.steps[position].gradient
        update = self._after(mine, made)
        # The second part of each node takes no more than both at once.
        parted = max(parted, kept + deferred + max((self.steps[position].backward for position in mine), default=0))
        sent = self._sent(inside)
        return Walk(kept, forward, backward, *update, max(first, held + made), made, sent, deferred, parted)

    def walk_anew(self, members: int) -> Walk:
        """The same where the stage is computed anew in the backward, and keeps only what it has sent."""
        inside = set(bits(members))
        mine = self._positions(inside)
        ahead, back, sums, _ = self._changes(inside, mine, leaves=False)
        kept, again = self._there(mine, ahead)
        held = backward = first = sent = self._sent(inside)
        made, begun = 0, False
        for position in reversed(mine):
            if self.steps[position].saved and not begun:
                begun = True
                backward, first = max(backward, held + again), max(first, held + again + made)
                held += kept
            peak = held + self.steps[position].backward + sums[position]
            backward, first = max(backward, peak), max(first, peak + made)
            held += back[position]
            made += self.steps[position].gradient
        update = self._after(mine, made)
        return Walk(sent, self._bare_forward(inside), backward, *update, max(first, held + made), made, sent)

    def _after(self, mine: list[int], gradients: int) -> tuple[int, int]:
        """After the last backward: the optimizer's workspace, one parameter after another and all together."""
        apart, together = _update([self.steps[position] for position in mine])
        copied = min(self.copied, gradients)
        return max(apart, copied), max(together, copied)

    def _positions(self, inside: set[int]) -> list[int]:
        return sorted(position for v in inside for position in self._of_block(v).steps)

    def _there(self, mine: list[int], ahead: Mapping[int, int]) -> tuple[int, int]:
        """What is held after a forward through ``mine`` that adds ``ahead`` at each node, and its peak."""
        held = forward = 0
        for position in mine:
            forward = max(forward, held + self.steps[position].forward)
            held += ahead[position]
        return held, forward

    def _bare_forward(self, inside: set[int]) -> int:
        """The peak of a forward that saves nothing; what each node takes is as if it saved what it does."""
        change: _Bytes = defaultdict(int)
        for storage in (self.storages[number] for v in inside for number in self._of_block(v).made):
            within = [reader for reader in storage.readers if self.steps[reader].block in inside]
            change[storage.maker] += storage.size
            if not storage.returned and len(within) == len(storage.readers):
                change[max((storage.maker, *within))] -= storage.size
        held, forward = self._there(self._positions(inside), change)
        return max(forward, held)

    def _sent(self, blocks: set[int]) -> int:
        """Bytes of the storages made in ``blocks`` that are returned, or read outside."""
        made = (self.storages[number] for v in blocks for number in self._of_block(v).made)
        return sum(s.size for s in made if s.returned or any(self.steps[r].block not in blocks for r in s.readers))

    def _changes(self, blocks: set[int], mine: list[int], *, leaves: bool) -> tuple[_Bytes, _Bytes, _Bytes, _Bytes]:
        """By node: what its forward and its backward add to what is held, the largest sum of gradients it makes, and
        what of its backward's are gradients that wait.

        Unless the stage ``leaves`` what it sends, that is held as long as its own nodes need it. What is said of nodes
        that are not ``mine``, in no block of ``blocks``, means nothing.
        """
        inside = set(mine)
        ahead: _Bytes = defaultdict(int, {position: self.steps[position].saved for position in mine})
        back: _Bytes = defaultdict(int, {position: -self.steps[position].saved for position in mine})
        sums: _Bytes = defaultdict(int)
        waits: _Bytes = defaultdict(int)
        for storage in {s for v in blocks for s in self._of_block(v).storages}:
            size, maker, readers, saver, returned = self.storages[storage]
            stays = leaves and (returned or not inside.issuperset(readers))
            if not leaves:
                readers, saver = tuple(r for r in readers if r in inside), saver if saver in inside else None
            if saver is not None and (stays or maker not in inside):
                ahead[saver] -= size  # it is held before and after
                back[saver] += size
            if maker in inside and (stays or saver != maker):
                ahead[maker] += size
                if not stays:
                    # From its saver on it is in what that node saves; else it goes with its last reader.
                    ahead[saver if saver is not None else max((maker, *readers))] -= size
        for number in {g for v in blocks for g in self._of_block(v).gradients}:
            gradient = self.gradients[number]
            within = [reader for reader in gradient.readers if reader in inside]
            waits[within[-1]] += gradient.size
            for reader in within[:-1]:
                sums[reader] = max(sums[reader], gradient.added)
            # A maker outside is not walked through: what it waits for stays.
            waits[within[0] if gradient.maker is None else gradient.maker] -= gradient.size
        for position, size in waits.items():
            back[position] += size
        return ahead, back, sums, waits

    def _of_block(self, block: int) -> _Part:
        return self._parts.get(block) or _Part([], [], [], [])

    @cached_property
    def _parts(self) -> dict[int, _Part]:
        """By block: the positions of its nodes, of the storages that they make or save, and of the gradients made."""
        parts: dict[int, _Part] = defaultdict(lambda: _Part([], [], [], []))
        for position, step in enumerate(self.steps):
            parts[step.block].steps.append(position)
        for number, storage in enumerate(self.storages):
            parts[self.steps[storage.maker].block].made.append(number)
            for node in {storage.maker, storage.maker if storage.saver is None else storage.saver}:
                parts[self.steps[node].block].storages.append(number)
        for number, gradient in enumerate(self.gradients):
            for node in gradient.readers:
                parts[self.steps[node].block].gradients.append(number)
        return dict(parts)

    def coming(self) -> dict[int, int]:
        """By block: bytes of all that its nodes save, make and wait for, as if nothing ever went."""
        found = dict.fromkeys((step.block for step in self.steps), 0)
        for step in self.steps:
            found[step.block] += step.saved + step.deferred
        for storage in self.storages:
            found[self.steps[storage.maker].block] += storage.size
        for gradient in self.gradients:
            for reader in gradient.readers:
                found[self.steps[reader].block] += gradient.size + gradient.added
        return found

    def least(self, block: int) -> Walk:
        """What ``block`` takes at least in any stage: the peaks of its nodes, without what other blocks make."""
        part = self._of_block(block)
        saved: dict[int, int] = {position: self.steps[position].saved for position in part.steps}
        for storage in (self.storages[number] for number in part.storages):
            if storage.saver in saved and storage.maker != storage.saver:
                saved[storage.saver] -= storage.size
        mine = [self.steps[position] for position in saved]
        kept = sum(max(0, size) for size in saved.values())
        backward = max((max(0, size) + self.steps[i].backward for i, size in saved.items()), default=0)
        forward, made = max((step.forward for step in mine), default=0), sum(step.gradient for step in mine)
        return Walk(kept, forward, backward, *_update(mine), backward, made, 0)

    def most_at_once(self) -> int:
        """What no stage exceeds at once, beside what comes with the micro-batches."""
        together = sum(step.update_together for step in self.steps)
        left = max((step.update_left for step in self.steps), default=0)
        return max([together, self.copied, *(max(s.forward, s.backward, s.update + left) for s in self.steps)])

    def peaks(self, members: int) -> dict[int, int]:
        """By block of a stage: the peak of the stage's forward while the block runs."""
        inside = set(bits(members))
        mine = self._positions(inside)
        ahead = self._changes(inside, mine, leaves=True)[0]
        found: dict[int, int] = {}
        held = 0
        for position in mine:
            step = self.steps[position]
            found[step.block] = max(found.get(step.block, 0), held + step.forward)
            held += ahead[position]
        return found

    def with_more(self, forward: Mapping[int, int]) -> Ledger:
        """The same with more bytes in the forward of blocks, whose weights are brought for it."""
        return replace(self, steps=tuple(s._replace(forward=s.forward + forward.get(s.block, 0)) for s in self.steps))


def engine_bytes(one: Walk, count: int, held: int, gradients: int, relayed: int, *, all_first: bool, last: bool) -> int:
    """The peak of what comes and goes in a step of the pipeline engine: engine(s) of problem.py.

    Args:
        one: a micro-batch's walk, like that of each of ``count``.
        held: how many are in flight at once.
        gradients: of each, the bytes of gradients that are sent.
        relayed: of these, those that are copies.
        all_first: whether all forwards come before the first backward, as under GPipe.
        last: whether no stage is behind.
    """
    backward = relayed + one.backward
    peak = (held - 1) * one.kept + max(one.forward, relayed + one.first) - one.gradients
    if count == 1:
        return peak
    if all_first:
        left = gradients + (0 if last else one.sent)
        return max(peak, backward + max((count - 1 - done) * one.kept + done * left for done in (1, count - 1)))
    if count == held:
        return max(peak, (held - 2) * one.kept + gradients + backward)
    if held == 1:
        return max(peak, gradients + max(one.sent + one.forward, backward))
    stays = one.sent if count >= 2 * held - 1 else 0
    return max(peak, (held - 1) * one.kept + gradients + stays + max(one.forward, backward))


EMPTY = Ledger(())
"""Nothing takes memory for a micro-batch."""


def _update(steps: list[Step]) -> tuple[int, int]:
    """What the optimizer takes: one parameter after another, and all at once."""
    most = left = 0
    for step in steps:
        if step.update:
            most, left = max(most, left + step.update), step.update_left
    return most, sum(step.update_together for step in steps)
