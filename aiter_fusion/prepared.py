"""Weights of FP8 linear layers in the order in which hipBLASLt reads them, stored so once and for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import bridge, config, side_by_side
from .providers.known import BRIDGE_PROVIDERS
from .providers.tiles import TILE, shuffled
from .registry import REGISTRY

aten = torch.ops.aten

# Rows with which a layer's product is tried before its weight is shuffled: a token, a small batch, and the most that
# hipBLASLt tunes for.
ROWS = (1, 16, 512)

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


def prepare(model: nn.Module, provider: str = "auto", product: str = "hipb_mm") -> Prepared:
    """Store the weights of FP8 linear layers as hipBLASLt reads them, so that no call has to; changes the model.

    To be called once, on the device that the model runs on, before it is compiled or run. A weight is replaced by a
    ``ShuffledWeight`` and freed, one after another: none is held twice. Weights that modules share stay shared.

    With AITER each layer's product is first computed for 1, 16 and 512 rows, because there are sizes for which
    hipBLASLt has no kernel: such a layer stays as it was, with that reason. A prepared layer that meets such a number
    of rows later is computed as ``bridge.gemm_a8w8`` is, which a warning says once: a copy of its weight, back in rows,
    is made for that call, and again for every such call.

    Args:
        model: with linear layers quantised by torchao, activations and weights to FP8 with a scale for each row.
        provider: who computes them. ``auto``: AITER if the environment's preferences ``AITER``, ``LINEAR`` and
            ``LINEAR_HIPBMM`` are on; ``aiter``: whatever they are; ``reference``: plain PyTorch, to try it out.
        product: ``hipb_mm``, or ``side_by_side``: weights stay in rows, those of neighbouring layers one after another
            in memory, so that ``aiter_fusion::fp8_linear`` by AITER is one product. No provider reads them otherwise.

    Raises:
        RuntimeError: the provider asked for by name cannot run here; the message says why.
    """
    if product == "side_by_side":
        stored = tuple(path for group in side_by_side.store(model) for path in group)
        others = (path for path, module in model.named_modules() if isinstance(module, nn.Linear))
        alone = "no neighbour in its module has as many inputs and is quantised alike, with a scale for each row"
        weights = {path: model.get_submodule(path).weight for path in others if path not in stored}
        return Prepared(stored, {path: alone for path, weight in weights.items() if _is_fp8(weight)})
    if product != "hipb_mm":
        raise ValueError(f"product={product!r}: weights are stored for hipb_mm, or side_by_side")
    if provider not in ("auto", "aiter", "reference"):
        raise ValueError(f"provider={provider!r}: shuffled weights are read by auto, aiter and reference")
    name = "aiter" if provider == "auto" else provider
    missing = BRIDGE_PROVIDERS[name].missing()
    if provider == "aiter" and missing is not None:
        raise RuntimeError(f"provider='aiter' cannot run here: {missing}")
    general = [missing] if missing is not None else []
    if provider == "auto":
        general += config.against("hipb_mm_fp8")
    readers: dict[int, list[tuple[str, nn.Linear]]] = {}  # by weight, which modules may share
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and (_is_fp8(module.weight) or _is_shuffled(module.weight)):
            readers.setdefault(id(module.weight), []).append((path, module))
    layers, refused = [], {}
    for modules in readers.values():
        weight: Any = modules[0][1].weight
        if not _is_shuffled(weight):
            biases = [module.bias for _, module in modules]
            why = [*general, *_objections(weight, biases, name, asked=not general)]
            if why:
                refused |= dict.fromkeys((path for path, _ in modules), "; ".join(why))
                continue
            tiles = shuffled(weight.qdata.contiguous())
            new = ShuffledWeight(tiles, weight.scale, weight.dtype, ByTorchAO(weight.act_quant_kwargs), name)
            parameter = nn.Parameter(new, requires_grad=False)
            for _, module in modules:
                module.weight = parameter
        layers += [path for path, _ in modules]
    return Prepared(tuple(layers), refused)


def _is_shuffled(weight: Any) -> bool:
    return isinstance(weight, Tensor) and isinstance(weight.data, ShuffledWeight)


def _is_fp8(weight: Any) -> bool:
    """Whether it is torchao's tensor of FP8 values, which need not be installed."""
    return all(hasattr(weight, name) for name in ("qdata", "scale", "act_quant_kwargs"))


def _objections(weight: Any, biases: Sequence[Tensor | None], provider: str, asked: bool) -> list[str]:
    """Every condition of a shuffled product that the layers of a weight do not meet; the provider is asked only if it
    is there, and its library tried only if the provider takes the layers."""
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
    op = REGISTRY.bridge["hipb_mm_fp8", frozenset()]
    calls = [_call(weight, bias, rows) for bias in biases for rows in ROWS]
    found = [BRIDGE_PROVIDERS[provider].why_not(op, call) for call in calls]
    if provider == "aiter" and not any(found):
        from .providers.aiter import hipblaslt  # not before: loading it takes a while

        found = [hipblaslt.why_unsolved(call) for call in calls]
    return list(dict.fromkeys(why for why in found if why is not None))


def _call(weight: Any, bias: Tensor | None, rows: int) -> dict[str, Any]:
    """A call of ``hipb_mm_fp8`` as a prepared layer makes it, but for the values: whether there is a kernel for it does
    not depend on them, so the weight stands for its own tiles."""
    return {
        "a": weight.qdata.new_zeros(rows, weight.qdata.shape[1]),
        "b": weight.qdata.t(),
        "a_scale": weight.scale.new_ones(rows, 1),
        "b_scale": weight.scale.t(),
        "bias": bias,
        "dtype": weight.dtype,
        "b_is_shuffled": True,
    }
