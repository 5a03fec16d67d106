"""Training by a plan from the user's own script: each process of ``torchrun`` is one device of the pipeline.

The forward is captured on every rank, cut by the plan, and each rank keeps its stages. The schedule is the engine's;
the loss, the optimizer and the loop are the user's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwright.errors import ShardwrightError, kind_of
from shardwright.profiler.recording.callsites import error_site
from shardwright.profiler.recording.structure import map_tensors, tensors_in
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.check import apart, changed_apart, check_can_be_piped, check_inputs, check_model
from shardwright.sharder.runtime.nodes import interface_put_back
from shardwright.sharder.runtime.piping.batches import BatchForm, Division, fingerprint, pieces_of, sampled
from shardwright.sharder.runtime.piping.engine import SharedGradients
from shardwright.sharder.runtime.piping.randomness import OwnNumbers
from shardwright.sharder.runtime.piping.ranks import Ranks
from shardwright.sharder.runtime.piping.replicas import ReplicaGradients
from shardwright.sharder.runtime.piping.stage_engine import StageEngine
from shardwright.sharder.runtime.piping.stages import Recipe, release_others
from shardwright.sharder.runtime.piping.stagestate import StageState, load_checkpoint, save_checkpoint

__all__ = ["Pipe", "pipeline"]

KEPT_ENGINES = 4
"""Engines for so many divisions of a batch are kept, each with its buffers."""

Loss = Callable[[Any, Any], Tensor]


def pipeline(
    model: nn.Module,
    plan: Plan,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    timeout_s: float = 600.0,
) -> Pipe:
    """Take this process's stages of ``model`` by ``plan``, to be trained with an ordinary optimizer and loop.

    Call it in every process of ``torchrun --nproc-per-node DEVICES script.py``, with the same model, plan and sample.
    Rank k is the plan's k-th device and holds the weights of its stages alone (stage k, and in an interleaved plan
    further ones): ``model`` is used up, the parameters of other stages lose their values. What several stages use is
    made equal from the first of them. With replicas each is a pipeline of consecutive ranks, which takes an equal part
    of each batch; gradients are summed over them, weights and buffers made equal from the first. Ranks that are seeded
    alike draw random numbers apart, such as dropout's, and none of the script's. A plan with one stage and no replicas
    needs no ``torchrun``. The process group is the script's if it has one, else made from the environment and left by
    :meth:`Pipe.close`. On several nodes (``--nnodes``) the devices of each are counted together, see docs/nodes.md.

    Args:
        args: a sample batch as the plan was made for, for the capture.
        kwargs: likewise.
        loss: called as ``loss(output, target)`` on the last stage for each micro-batch, with the model's own result.
        reduction: ``"mean"`` if the loss averages over its samples: a batch's loss is then the mean of its
            micro-batches'; ``"sum"`` if it adds them up. A mean over something else than samples, such as tokens that
            are not ignored, is the whole batch's only where the micro-batches have equally many.
        timeout_s: a rank that waits so long for another one's message gives up.

    Raises:
        ShardwrightError: there are not as many processes as devices, the ranks differ in their plan or sample, or the
            plan is for another model or other inputs, or cannot be piped.
    """
    if reduction not in ("mean", "sum"):
        raise ShardwrightError(f'reduction={reduction!r}; it is "mean" or "sum"')
    if not isinstance(plan, Plan):
        raise ShardwrightError(f"the plan is {kind_of(plan)}; give a Plan, such as shardwright.Plan.load(file) reads")
    kwargs = dict(kwargs or {})

    def ready() -> None:
        check_model(plan, model)
        check_inputs(plan, args, kwargs)
        check_can_be_piped(plan, model)

    with interface_put_back(os.environ):
        ranks = Ranks(plan, timeout_s, ready)
        with ranks.failing_together():
            ranks.pin()
            ranks.agree("a plan", plan.model_dump_json(), "make the plan once and have each rank load its file")
            if ranks.hosted:
                remedy = "enter torch.autocast for each kind of the plan's devices, with one dtype, or for none"
                ranks.agree("an autocast dtype", str(_autocast(ranks.device)), remedy)
            return Pipe(model, plan, args, kwargs, ranks, loss, reduction)


class Pipe:
    """A device's stages of a model in training; made by :func:`pipeline`.

    Methods that say *together* are to be called on every rank, for they send messages; what one rank raises there, all
    raise. ``module`` holds what this rank's stages call, ``device`` is where it is, ``stage`` the first one's number,
    ``replica`` that of the pipeline.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        ranks: Ranks,
        loss: Loss | None,
        reduction: str,
    ) -> None:
        self.label = ranks.label
        """What the rank is called in errors."""
        self.plan, self.stage, self.replica, self.device = plan, ranks.position, ranks.replica, ranks.device
        self._ranks, self._loss, self._reduction = ranks, loss, reduction
        self._form = BatchForm.of(args, kwargs, plan.batch, plan.microbatches, plan.replicas)
        self._autocast = _autocast(self.device)
        self._numbers = OwnNumbers(self.device, ranks.rank) if ranks.size > 1 else None
        normalised = apart(model, plan, ())  # before it is all in training
        if plan.train and not model.training:
            model.train()
        saved = tuple(model.state_dict())
        drawn = sampled(model)
        self._recipe = Recipe(model, plan, ranks.position, ranks.device, args, kwargs)
        differs = "; ".join(filter(None, (normalised, changed_apart(plan, self._recipe.changes))))
        if differs and ranks.rank == 0:
            warnings.warn(differs, stacklevel=3)  # where the pipeline is asked for
        self.module: nn.Module = self._recipe.form(self._recipe.size, train=plan.train).module
        programs, place = self._recipe.programs, (ranks.position, ranks.depth)
        self._state = StageState(model, saved, programs, self.module, *place, keeps_unused=ranks.replica == 0)
        release_others(model, [form.module for form in self._recipe.forms.values()], self._state.unused.values())
        self._recipe.settle()
        ranks.assemble()  # what failed in the capture is of this rank alone
        if ranks.differ(drawn) and ranks.rank == 0:
            warnings.warn(
                "the ranks have built models of other weights, and each keeps those of its own stages: seed all ranks "
                "alike, or load a checkpoint",
                stacklevel=3,
            )
        self._shared = self._shared_gradients()
        self._summing = ReplicaGradients(self.module, ranks.alike)
        self._engines: dict[tuple[Division, bool], StageEngine] = {}
        self._seen_a_batch = False
        self._buffers_differ = False
        self._make_copies_equal()
        self._make_replicas_equal()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`forward`."""
        return self.forward(*args, **kwargs)

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """Forward and backward over the micro-batches, *together*: adds to the gradients, as ``backward()`` does.

        Every rank is given the whole batch, of which the first uses the inputs and the last the target. A batch of
        another size than the plan's is divided into micro-batches of the plan's size, or if that is not possible into
        as many equal ones as there can be, for which the forward is captured once more: by a plan of four micro-batches
        of 4 samples, 12 samples are three of 4, 10 are two of 5, and 13 are one of 13.

        Args:
            target: what the loss gets beside the output; tensors in it that are as long as the batch are divided.

        Returns:
            The batch's loss, a number without gradient, on every rank.

        Raises:
            ShardwrightError: the inputs are not like the sample, or the ranks' first batches differ, or a stage or the
                loss fails on any rank.
        """
        with self._ranks.failing_together(), self._captured_modes():
            if self._loss is None:
                raise ShardwrightError("there is no loss to train with: make it pipeline(model, plan, ..., loss=...)")
            if not self.plan.train:
                raise ShardwrightError("the plan is for inference; profile with train=True and plan that profile")
            if not torch.is_grad_enabled():
                raise ShardwrightError("step() trains, and gradients are disabled here; evaluate() does not train")
            engine, tensors, targets = self._begin("step", args, kwargs, target, train=True)
            self._buffers_differ = True
            with self._ranks.messages(), self._summing.summed(), self._shared.summed():  # sums are messages too
                losses = engine.train(tensors, targets, self._micro_loss)
            return self._ranks.spread(torch.stack(losses).sum() if losses else None)

    def evaluate(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """The batch's loss as :meth:`step` gives it, without gradients and with the model in evaluation, *together*."""
        with self._ranks.failing_together(), self._captured_modes(), torch.no_grad():
            if self._loss is None:
                raise ShardwrightError("there is no loss to evaluate: make it pipeline(model, plan, ..., loss=...)")
            engine, tensors, targets = self._begin("evaluate", args, kwargs, target, train=False)
            outputs = [engine.form.output.filled(output) for output in engine.infer(tensors)]
            count = engine.division.pieces * self._ranks.replicas

            def found() -> Tensor | None:
                pairs = zip(outputs, targets, strict=True) if outputs else ()
                losses = [self._micro_loss(o, t, count) for o, t in pairs]
                return torch.stack(losses).sum() if losses else None

            return self._ranks.spread_what(found)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result for a batch, in evaluation and without gradients, on every rank, *together*.

        Tensors that grow with the batch are put together again; of others, floating ones are averaged over the
        micro-batches. Tensors that the pipeline does not carry, such as the entries of a cache, are None.
        """
        with self._ranks.failing_together(), self._captured_modes(), torch.no_grad():
            engine, tensors, _ = self._begin("forward", args, kwargs, None, train=False)
            outputs = engine.infer(tensors)
            parts = []
            for last in self._ranks.last_ranks:
                mine = self._ranks.rank == last
                parts.append(engine.form.output.joined(outputs) if mine else engine.room())
                for tensor in parts[-1]:
                    self._ranks.broadcast(tensor, last)
            return engine.form.output.filled(parts[0] if len(parts) == 1 else engine.form.output.joined(parts))

    def parameters(self) -> Iterator[nn.Parameter]:
        """The stage's parameters, each once, for an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The stage's parameters by their names in the model."""
        return self._state.parameters()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all stages' gradients so that their norm is at most ``max_norm``, *together*.

        A parameter of several stages counts once, as in the whole model.

        Returns:
            The norm before, on every rank, as of :func:`torch.nn.utils.clip_grad_norm_`.
        """
        with self._ranks.failing_together():
            self._ranks.do_alike("clip_grad_norm_()")
            grads = [p.grad for p in self._state.owned() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads, norm_type).to(self.device, torch.float64)
            if norm_type == float("inf"):
                self._ranks.reduce(norm, dist.ReduceOp.MAX)
            else:
                norm = norm**norm_type
                self._ranks.reduce(norm, dist.ReduceOp.SUM)
                norm = norm ** (1.0 / norm_type)
            total = norm.to(torch.get_default_dtype())
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters()), max_norm, total)
            return total

    def train(self, mode: bool = True) -> Pipe:
        """Set the mode of this stage's modules, as :meth:`torch.nn.Module.train` does.

        Only :meth:`step` goes by it, and what the forward does between units stays as captured, in training;
        :meth:`forward` and :meth:`evaluate` always evaluate.
        """
        self.module.train(mode)
        return self

    def eval(self) -> Pipe:
        """As ``train(False)``."""
        return self.train(mode=False)

    def state_dict(self, *, full: bool = False) -> dict[str, Any]:
        """The stage's part of the model's state under the model's names, the tensors themselves.

        Args:
            full: the whole model's instead, in the host's memory of rank 0 and empty on the others, *together*.
        """
        if not full:
            return self._state.tensors()
        with self._ranks.failing_together():
            self._ranks.do_alike("state_dict(full=True)")
            return self._state.gather(self._ranks)

    def load_state_dict(self, state: Mapping[str, Any], *, full: bool = False) -> None:
        """Take this stage's part from the model's state, which may be whole.

        Args:
            full: only rank 0 gives a state, the whole model's, which is handed out, *together*.

        Raises:
            ShardwrightError: it is not this model's.
        """
        if not full:  # alone, a rank must not count a call: the others would be behind
            self._state.load(state)
            return
        with self._ranks.failing_together():
            self._ranks.do_alike("load_state_dict(full=True)")
            # Of other replicas than the first the tensors are their own, until these are made equal.
            self._state.load(self._state.tensors() | self._state.scatter(state, self._ranks))
            self._make_replicas_equal()

    def optimizer_state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of this stage's optimizer by the parameters' names in the model.

        Keys are those of ``torch.distributed.checkpoint.state_dict`` with ``flatten_optimizer_state_dict=True``, such
        as ``state.head.weight.exp_avg`` and ``param_groups.head.weight.lr``; a tied parameter has its first name.
        """
        return self._state.optimizer_state(optimizer)

    def load_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Give this stage's optimizer its part of such a state, which may hold the others' too."""
        self._state.load_optimizer(optimizer, state)

    def save(self, folder: str | Path, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write the model's and the optimizer's state into ``folder`` by ``torch.distributed.checkpoint``, *together*.

        The keys ``model`` and ``optimizer`` hold what :meth:`state_dict` and :meth:`optimizer_state_dict` give, so any
        other number of stages, or the whole model, can go on from it.
        """
        with self._ranks.failing_together():
            self._ranks.do_alike("save()")
            save_checkpoint(folder, self._state, self._ranks, optimizer)

    def load(self, folder: str | Path, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Go on from what :meth:`save` wrote, on any number of stages, *together*.

        Raises:
            ShardwrightError: there is no checkpoint, or it is not of this model.
        """
        with self._ranks.failing_together():
            self._ranks.do_alike("load()")
            load_checkpoint(folder, self._state, self._ranks, optimizer)

    def close(self) -> None:
        """Leave the process groups that the pipeline made; it cannot be used afterwards."""
        self._engines.clear()
        if dist.is_initialized():
            self._shared.close()
        self._ranks.close()

    def _begin(
        self, what: str, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, *, train: bool
    ) -> tuple[StageEngine, list[Tensor], list[Any]]:
        """The engine for a batch, its tensors, and its target for each micro-batch."""
        tensors, batch = self._form.read(args, kwargs)
        self._ranks.do_alike(f"{what}() of {batch} samples")
        if not self._seen_a_batch:  # each rank draws its batches itself; a seed that differs shows in the first
            self._ranks.agree(
                "a batch",
                fingerprint(tensors, target),
                "give every rank the same inputs and target, in the same order (seed the sampler alike)",
            )
            self._seen_a_batch = True
        if self._buffers_differ and not train:  # one model is evaluated, and it is the one that is saved
            self._ranks.make_alike(self.module.buffers())
            self._buffers_differ = False
        division = self._form.divided(batch)
        each, replica = division.pieces // self._ranks.replicas, self.replica
        targets = pieces_of(target, batch, division)[replica * each : (replica + 1) * each]
        own = self._form.part(tensors, division, replica)
        return self._engine(division._replace(pieces=each), train=train), own, targets

    def _engine(self, division: Division, *, train: bool) -> StageEngine:
        if (division, train) not in self._engines:
            while len(self._engines) >= KEPT_ENGINES:
                self._engines.pop(next(iter(self._engines)))
            form = self._recipe.form(division.size, train=train)
            self._engines[division, train] = StageEngine(
                form, division, self.plan, self._form.batched, self._ranks, train
            )
        return self._engines[division, train]

    def _micro_loss(self, output: Any, target: Any, count: int) -> Tensor:
        """The part of a micro-batch in the batch's loss."""
        assert self._loss is not None  # asked before
        kind, dtype = self.device.type, self._autocast
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            try:
                found = self._loss(output, _on(target, self.device))
            except Exception as error:
                site = error_site(error)
                raise ShardwrightError(
                    f"the loss function failed{site and f' at {site}'} on a micro-batch of {self.label}: "
                    f"{type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
        if not isinstance(found, Tensor) or found.numel() != 1:
            what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ShardwrightError(f"the loss function returned {what}; a step needs a tensor with one number")
        if torch.is_grad_enabled() and not found.requires_grad and _has_gradient(output):
            raise ShardwrightError(
                "the loss function returned a number without gradient, though the model's output has one: compute the "
                "loss of that output, without detach() or no_grad()"
            )
        return found.reshape(()) / (count if self._reduction == "mean" else 1)

    @contextmanager
    def _captured_modes(self) -> Iterator[None]:
        """The forward with the autocast regions that were captured, and those alone; and with numbers of its own."""
        if _autocast(self.device) != self._autocast:
            here, there = (str(dtype or "none") for dtype in (_autocast(self.device), self._autocast))
            raise ShardwrightError(
                f"autocast is {here} here and was {there} where the pipeline was made, which is built in; "
                "call pipeline() and its methods in the same region"
            )
        with torch.autocast(self.device.type, enabled=False), self._numbers.drawn() if self._numbers else nullcontext():
            yield

    def _shared_gradients(self) -> SharedGradients:
        """Those of this rank's pipeline; the groups of all are made by all."""
        ranks, limit = self._ranks, timedelta(seconds=self._ranks.timeout_s)
        ties = self._state.shared if self.plan.train else ()
        found = [
            SharedGradients(
                ties,
                ranks.position if number == ranks.replica else -1,
                self.module,
                ranks=range(number * ranks.depth, (number + 1) * ranks.depth),
                backend=ranks.backend,
                limit=limit,
            )
            for number in range(ranks.replicas)
        ]
        return found[ranks.replica]

    @torch.no_grad()
    def _make_replicas_equal(self) -> None:
        """Give this rank's parameters and buffers the values of the first replica's."""
        self._ranks.make_alike((*self.module.parameters(), *self.module.buffers()))

    @torch.no_grad()
    def _make_copies_equal(self) -> None:
        """Give all copies of a tensor the values of the first, should the ranks' models have been made apart."""
        mine = self._state.tensors(themselves=True)
        for key, holders in self._state.copies.items():
            value = mine[key].detach().clone() if self.stage in holders else None
            if value is None:
                value = torch.empty_like(self._state.forms[key], device=self.device)
            self._ranks.broadcast(value, holders[0])
            if self.stage in holders:
                mine[key].copy_(value)


def _autocast(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast region that this is in, for ``device``; None outside of one."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _has_gradient(output: Any) -> bool:
    return any(tensor.requires_grad for _, tensor in tensors_in(output))


def _on(value: Any, device: torch.device) -> Any:
    return map_tensors(lambda tensor: tensor.to(device), value)
