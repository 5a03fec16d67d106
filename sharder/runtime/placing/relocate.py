"""Relocation: the parameters and buffers of a model come to other devices, and stay the tensors that they are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.sharder.runtime.placing.sim import parameters_may_move

__all__ = ["relocate", "tensors_of"]


def relocate(model: nn.Module, home_of: Mapping[int, torch.device]) -> None:
    """Move parameters and buffers, by the ``id`` of the tensor, each with its gradient; shared ones stay one tensor."""
    shared: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    shared.setdefault(id(tensor), []).append((own, name))
    alike = [places for places in shared.values() if len(places) > 1]
    homes = dict(home_of)
    for _, tensor in tensors_of(model):
        if tensor.grad is not None and id(tensor) in homes:
            homes[id(tensor.grad)] = homes[id(tensor)]
    kept = [(tensor, tensor.grad) for _, tensor in tensors_of(model)]  # no id is given anew while they are in use
    for module in model.modules():
        own_tensors = [t for _, t in tensors_of(module, recurse=False)]
        if all(t.device == homes.get(id(t), t.device) for t in own_tensors):
            continue
        types = {t.device.type for t in own_tensors} | {homes[id(t)].type for t in own_tensors if id(t) in homes}
        with parameters_may_move() if "sim" in types else nullcontext():
            module._apply(lambda tensor: tensor.to(homes.get(id(tensor), tensor.device)), recurse=False)
    for places in alike:
        for own, name in places[1:]:
            own[name] = places[0][0][places[0][1]]
    del kept


def tensors_of(module: nn.Module, *, recurse: bool = True) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, each once."""
    return [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
