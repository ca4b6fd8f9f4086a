"""Weights of FP8 linear layers in the order in which hipBLASLt reads them, stored so once and for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import bridge, config
from .op import BRIDGE
from .ops.gemm import TILE, shuffled
from .providers import BRIDGE_PROVIDERS

aten = torch.ops.aten

# What a weight can be asked for besides a linear layer: what modules do with their parameters.
KEEPING = (aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default)


class ShuffledWeight(Tensor):
    """The weight of a linear layer, ``[N, K]``, as tiles ``[N / 16, K / 32, 16, 32]`` of FP8, which is its shape.

    ``F.linear`` quantises its input as the layer did, one scale a row, and calls ``aiter_fusion::hipb_mm_fp8``. The
    shape says what it is: guards and cache keys differ from those of the weight that it was made of, and whatever
    else multiplies with it fails.
    """

    tiles: Tensor
    scale: Tensor
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    provider: str

    @staticmethod
    def __new__(cls, tiles: Tensor, scale: Tensor, dtype: torch.dtype, quantise: Any, provider: str) -> ShuffledWeight:
        made = Tensor._make_wrapper_subclass(cls, tiles.shape, dtype=dtype, device=tiles.device)  # type: ignore[attr-defined]
        made.tiles, made.scale, made.quantise, made.provider = tiles, scale, quantise, provider
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        n, k = self.tiles.shape[0] * TILE[0], self.tiles.shape[1] * TILE[1]
        return f"ShuffledWeight({n} x {k} of {self.tiles.dtype}, by {self.provider})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["tiles", "scale"], (self.dtype, self.quantise, self.provider)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, Tensor], meta: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> ShuffledWeight:
        return cls(inner["tiles"], inner["scale"], *meta)

    def _stable_hash_for_caching(self) -> str:
        return repr((tuple(self.shape), self.tiles.dtype, self.dtype, self.quantise, self.provider))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and not isinstance(args[0], cls):
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in KEEPING and kwargs.get("dtype") in (None, args[0].dtype):
            weight = args[0]
            device = {name: value for name, value in kwargs.items() if name != "dtype"}
            tiles, scale = (func(tensor, *args[1:], **device) for tensor in (weight.tiles, weight.scale))
            return cls(tiles, scale, weight.dtype, weight.quantise, weight.provider)
        raise TypeError(
            f"{func} on a weight that aiter_fusion.prepare has shuffled: only torch.nn.functional.linear computes with "
            "it; prepare the model after whatever else is to read its weights"
        )


def _linear(input: Tensor, weight: ShuffledWeight, bias: Tensor | None = None) -> Tensor:  # names as F.linear has them
    x, n, k = input, weight.tiles.shape[0] * TILE[0], weight.tiles.shape[1] * TILE[1]
    if x.shape[-1] != k:
        raise TypeError(f"a linear layer of {k} features was given {list(x.shape)}")
    q, scale = weight.quantise(x)
    y = bridge.hipb_mm_fp8(
        q.reshape(-1, k),
        weight.tiles.view(n, k).t(),
        scale.reshape(-1, 1),
        weight.scale.reshape(1, n),
        bias,
        weight.dtype,
        b_is_shuffled=True,
        provider=weight.provider,
    )
    return y.reshape(*x.shape[:-1], n)


@dataclass(frozen=True)
class ByTorchAO:
    """How torchao quantises a layer's input; comparable, so that graphs can be guarded on it."""

    arguments: Any

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor

        quantised: Any = _choose_quant_func_and_quantize_tensor(x, self.arguments)
        return quantised.qdata, quantised.scale


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` did.

    layers:  the linear layers whose weights are shuffled now, or were before.
    refused: layer -> every condition that it does not meet, for the other layers with FP8 weights.
    """

    layers: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


def prepare(model: nn.Module, provider: str = "auto") -> Prepared:
    """Store the weights of FP8 linear layers as hipBLASLt reads them, so that no call has to; changes the model.

    To be called once, on the device that the model runs on, before it is compiled or run. A weight is replaced by a
    ``ShuffledWeight`` and freed, one after another: none is held twice. Weights that modules share stay shared.

    Args:
        model: with linear layers quantised by torchao, activations and weights to FP8 with a scale for each row.
        provider: who computes them. ``auto``: AITER if the environment's preferences ``AITER``, ``LINEAR`` and
            ``LINEAR_HIPBMM`` are on; ``aiter``: whatever they are; ``reference``: plain PyTorch, to try it out.

    Raises:
        RuntimeError: the provider asked for by name cannot run here; the message says why.
    """
    if provider not in ("auto", "aiter", "reference"):
        raise ValueError(f"provider={provider!r}: shuffled weights are read by auto, aiter and reference")
    name = "aiter" if provider == "auto" else provider
    missing = BRIDGE_PROVIDERS[name].missing()
    if provider == "aiter" and missing is not None:
        raise RuntimeError(f"provider='aiter' cannot run here: {missing}")
    general = [missing] if missing is not None else []
    if provider == "auto":
        general += config.against("AITER", "LINEAR", "LINEAR_HIPBMM")
    made: dict[int, nn.Parameter] = {}
    layers, refused = [], {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or weight is None or not (_is_fp8(weight) or _is_shuffled(weight)):
            continue
        if not _is_shuffled(weight) and id(weight) not in made:
            why = [*general, *_objections(weight, name, asked=not general)]
            if why:
                refused[path] = "; ".join(why)
                continue
            tiles = shuffled(weight.qdata.contiguous())
            new = ShuffledWeight(tiles, weight.scale, weight.dtype, ByTorchAO(weight.act_quant_kwargs), name)
            made[id(weight)] = nn.Parameter(new, requires_grad=False)
        module.weight = made.get(id(weight), weight)  # type: ignore[assignment]
        layers.append(path)
    return Prepared(tuple(layers), refused)


def _is_shuffled(weight: Tensor) -> bool:
    return isinstance(weight.data, ShuffledWeight) or isinstance(weight, ShuffledWeight)


def _is_fp8(weight: Any) -> bool:
    """Whether it is torchao's tensor of FP8 values, which need not be installed."""
    return all(hasattr(weight, name) for name in ("qdata", "scale", "act_quant_kwargs"))


def _objections(weight: Any, provider: str, asked: bool) -> list[str]:
    """Every condition of a shuffled product that a layer does not meet; the provider is asked only if it is there."""
    if weight.act_quant_kwargs is None:
        return ["its activations are not quantised"]
    n, k = weight.qdata.shape
    objections = []
    granularity = type(weight.act_quant_kwargs.granularity).__name__
    if granularity != "PerRow":
        objections.append(f"its activations have scales {granularity}, not one for each row")
    if tuple(weight.scale.shape) != (n, 1):
        objections.append(f"its weight has scales {list(weight.scale.shape)}, not one for each of {n} rows")
    if n % TILE[0] or k % TILE[1]:
        objections.append(f"its weight is {n} x {k}, not in multiples of {TILE[0]} x {TILE[1]}")
    if objections or not asked:
        return objections
    tiny = {
        "a": weight.qdata.new_empty(1, k),
        "b": weight.qdata.t(),
        "a_scale": weight.scale.new_empty(1, 1),
        "b_scale": weight.scale.t(),
        "bias": None,
        "dtype": weight.dtype,
        "b_is_shuffled": True,
    }
    why = BRIDGE_PROVIDERS[provider].why_not(BRIDGE["hipb_mm_fp8"][frozenset()], tiny)
    return [why] if why is not None else []
