"""Weights of FP8 linear layers that read one value, stored side by side, so that one product computes them all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .scaled_product import MOST


def store(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Store the weights of neighbouring FP8 linear layers side by side; changes the model, and none of its results.

    Neighbours are linear layers one after another in one module, quantised alike by torchao to FP8 with a scale for
    each row, and with as many inputs: whether they read one value is for a graph to say, and does not matter here.
    Their weights become views of one tensor, and their scales of another; ``to`` another device takes them apart again.

    Args:
        model: to be stored anew, before it is compiled.

    Returns:
        The layers that lie side by side, group by group.
    """
    stored, moved = [], set()
    for path, parent in model.named_modules():
        for group in _neighbours(parent):
            weights: list[Any] = [layer.weight for _, layer in group]
            shared = len(set(map(id, weights))) < len(weights) or moved & set(map(id, weights))
            if len(group) < 2 or shared:  # what modules share can lie beside one neighbour alone
                continue
            values = torch.cat([weight.qdata for weight in weights])
            scales = torch.cat([weight.scale for weight in weights])
            start = 0
            for weight in weights:
                end = start + weight.qdata.shape[0]
                weight.qdata, weight.scale = values[start:end], scales[start:end]
                start = end
            moved |= set(map(id, weights))
            stored.append(tuple(f"{path}.{name}".removeprefix(".") for name, _ in group))
    return tuple(stored)


def _neighbours(parent: nn.Module) -> Iterator[list[tuple[str, nn.Linear]]]:
    """Linear layers of a module one after another, as many as one product computes, that can be one matrix."""
    group: list[tuple[str, nn.Linear]] = []
    for name, child in parent.named_children():
        kind = _kind(child)
        if group and (kind is None or kind != _kind(group[0][1]) or len(group) == MOST):
            yield group
            group = []
        if kind is not None and isinstance(child, nn.Linear):
            group.append((name, child))
    if group:
        yield group


def _kind(module: nn.Module) -> Any:
    """What must be the same of two layers that are to be one matrix; None for what is no such layer."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not all(hasattr(weight, name) for name in ("qdata", "scale")):
        return None
    values, scale = weight.qdata, weight.scale
    if values.dim() != 2 or tuple(scale.shape) != (values.shape[0], 1):
        return None
    return values.shape[1], values.dtype, scale.dtype, values.device, weight.dtype, repr(weight.act_quant_kwargs)
