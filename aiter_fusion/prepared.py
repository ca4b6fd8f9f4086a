"""Weights of FP8 linear layers in the order in which AMD's matrix cores read them, stored so once and for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import bridge, config, side_by_side
from .providers.known import BRIDGE_PROVIDERS
from .providers.tiles import TILE, shuffled, unshuffled
from .registry import REGISTRY

aten = torch.ops.aten

# The products that read shuffled weights -> granularity of the scales -> op of the bridge.
ROWS_OF, BLOCKS_OF = "row", "block of 128"
PRODUCTS: Mapping[str, Mapping[str, str]] = {
    "hipb_mm": {ROWS_OF: "hipb_mm_fp8"},
    "bpreshuffle": {ROWS_OF: "gemm_a8w8_bpreshuffle", BLOCKS_OF: "gemm_a8w8_blockscale_bpreshuffle"},
}
BLOCK = 128
HALVES = (torch.bfloat16, torch.float16)

# Rows with which a layer's product is tried before its weight is shuffled: a token, a small batch, and the most that
# hipBLASLt tunes for.
ROWS = (1, 16, 512)

# What a weight can be asked for besides a linear layer: what modules do with their parameters.
KEEPING = (aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default)


class ShuffledWeight(Tensor):
    """The weight of a linear layer, ``[N, K]``, as tiles ``[N / 16, K / 32, 16, 32]`` of FP8, which is its shape.

    ``F.linear`` quantises its input as the layer did and calls an op of the bridge. The shape says what it is: guards
    and cache keys differ from those of the weight that it was made of, and whatever else multiplies with it fails.

    tiles:       the weight.
    scale:       its dequantisation scales, one for each row or block.
    quantise:    (input) -> (FP8 values, scales), as the layer did.
    restore:     (weight row by row, scales) -> the layer's weight as it was.
    op:          of the bridge, that computes the product.
    provider:    of that op.
    is_shuffled: by this attribute AITER knows a shuffled weight. AITER sets it on a tensor, and it is lost with
                 ``Parameter``, ``to`` and compiled graphs; of this class it stays.
    """

    tiles: Tensor
    scale: Tensor
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    restore: Callable[[Tensor, Tensor], Tensor]
    op: str
    provider: str
    is_shuffled = True

    @staticmethod
    def __new__(
        cls, tiles: Tensor, scale: Tensor, dtype: torch.dtype, quantise: Any, restore: Any, op: str, provider: str
    ) -> ShuffledWeight:
        made = Tensor._make_wrapper_subclass(cls, tiles.shape, dtype=dtype, device=tiles.device)  # type: ignore[attr-defined]
        made.tiles, made.scale, made.quantise, made.restore = tiles, scale, quantise, restore
        made.op, made.provider = op, provider
        return made

    @property
    def sizes(self) -> tuple[int, int]:
        """N and K."""
        return self.tiles.shape[0] * TILE[0], self.tiles.shape[1] * TILE[1]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        n, k = self.sizes
        return f"ShuffledWeight({n} x {k} of {self.tiles.dtype}, for {self.op} by {self.provider})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["tiles", "scale"], (self.dtype, self.quantise, self.restore, self.op, self.provider)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, Tensor], meta: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> ShuffledWeight:
        return cls(inner["tiles"], inner["scale"], *meta)

    def _stable_hash_for_caching(self) -> str:
        return repr((tuple(self.shape), self.tiles.dtype, self.dtype, self.quantise, self.op, self.provider))

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
            return cls(tiles, scale, *weight.__tensor_flatten__()[1])
        raise TypeError(
            f"{func} on a weight that aiter_fusion.prepare has shuffled: only torch.nn.functional.linear computes with "
            "it; prepare the model after whatever else is to read its weights, or call aiter_fusion.unprepare before"
        )


def _linear(input: Tensor, weight: ShuffledWeight, bias: Tensor | None = None) -> Tensor:  # names as F.linear has them
    x, (n, k) = input, weight.sizes
    if x.shape[-1] != k:
        raise TypeError(f"a linear layer of {k} features was given {list(x.shape)}")
    q, scale = weight.quantise(x)
    q, rows, provider = q.reshape(-1, k), weight.tiles.view(n, k), weight.provider
    if weight.op == "hipb_mm_fp8":
        scales = scale.reshape(-1, 1), weight.scale.reshape(1, n)
        y = bridge.hipb_mm_fp8(q, rows.t(), *scales, bias, weight.dtype, b_is_shuffled=True, provider=provider)
        return y.reshape(*x.shape[:-1], n)
    if weight.op == "gemm_a8w8_bpreshuffle":
        y = bridge.gemm_a8w8_bpreshuffle(
            q, rows, scale.reshape(-1, 1), weight.scale.reshape(-1, 1), weight.dtype, provider=provider
        )
    else:
        scale = scale.reshape(-1, k // BLOCK)
        y = bridge.gemm_a8w8_blockscale_bpreshuffle(q, rows, scale, weight.scale, weight.dtype, provider=provider)
    y = y.reshape(*x.shape[:-1], n)
    return y if bias is None else y + bias  # these products take none


@dataclass(frozen=True)
class ByTorchAO:
    """How torchao quantises a layer's input; comparable, so that graphs can be guarded on it."""

    arguments: Any

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor

        quantised: Any = _choose_quant_func_and_quantize_tensor(x, self.arguments)
        return quantised.qdata, quantised.scale


@dataclass(frozen=True)
class ToTorchAO:
    """torchao's weight of its values and scales; ``context`` is what its class keeps besides."""

    kind: type
    context: Any

    def __call__(self, values: Tensor, scale: Tensor) -> Tensor:
        inner = {"qdata": values, "scale": scale}
        rebuilt: Any = cast(Any, self.kind).__tensor_unflatten__(inner, self.context, None, None)
        return rebuilt


@dataclass(frozen=True)
class ByGroups:
    """How transformers' FP8 layers quantise their input: a scale for each 128 columns of a row."""

    dtype: torch.dtype
    provider: str

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return bridge.group_quant(
            x.reshape(-1, x.shape[-1]).contiguous(), self.dtype, BLOCK, True, provider=self.provider
        )


@dataclass(frozen=True)
class ToValues:
    """The weight of transformers' FP8 layers, which keep the scales apart."""

    def __call__(self, values: Tensor, scale: Tensor) -> Tensor:
        return values


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` did.

    layers:  the linear layers whose weights are shuffled now, or were before.
    refused: layer -> every condition that it does not meet, for the other layers with FP8 weights.
    """

    layers: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


class _Layer(NamedTuple):
    """An FP8 layer that ``prepare`` might take: its weight row by row, scales, dtype of the result, how its input is
    quantised, how its weight is made again, and what speaks against it."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype
    quantise: Any
    restore: Any
    against: tuple[str, ...] = ()

    @property
    def granularity(self) -> str | None:
        """What shares a scale of the weight; None: neither a row nor a block."""
        n, k = self.values.shape
        known: dict[tuple[int, ...], str] = {(n, 1): ROWS_OF, (-(-n // BLOCK), -(-k // BLOCK)): BLOCKS_OF}
        return known.get(tuple(self.scale.shape))


def prepare(model: nn.Module, provider: str = "auto", product: str = "hipb_mm") -> Prepared:
    """Store the weights of FP8 linear layers as AMD's matrix cores read them, so that no call has to; changes the
    model.

    To be called once, on the device that the model runs on, before it is compiled or run. A weight is replaced by a
    ``ShuffledWeight`` and freed, one after another: none is held twice. Weights that modules share stay shared.
    ``unprepare`` takes it back.

    With AITER and ``hipb_mm`` each layer's product is first computed for 1, 16 and 512 rows, because there are sizes
    for which hipBLASLt has no kernel: such a layer stays as it was, with that reason. A prepared layer that meets such
    a number of rows later is computed as ``bridge.gemm_a8w8`` is, which a warning says once: a copy of its weight, back
    in rows, is made for that call, and again for every such call.

    Args:
        model: with linear layers quantised by torchao (activations and weights to FP8, with a scale for each row, or
            for each 128 columns and each 128 x 128), or by transformers (``FP8Linear``, 128 x 128).
        provider: who computes them. ``auto``: AITER if the environment's preferences ``AITER``, ``LINEAR`` and, for
            ``hipb_mm``, ``LINEAR_HIPBMM`` are on; ``aiter``: whatever they are; ``reference``: plain PyTorch, to try it
            out.
        product: ``hipb_mm``: hipBLASLt's, with scales for rows. ``bpreshuffle``: AITER's own, with scales for rows or
            blocks; a bias is added to its rounded result. ``side_by_side``: weights stay in rows, those of neighbouring
            layers one after another in memory, so that ``aiter_fusion::fp8_linear`` by AITER is one product; no
            provider reads them otherwise, and ``unprepare`` leaves them so.

    Raises:
        RuntimeError: the provider asked for by name cannot run here; the message says why.
        ValueError: there is no such provider or product.
    """
    if product == "side_by_side":
        stored = tuple(path for group in side_by_side.store(model) for path in group)
        others = (path for path, module in model.named_modules() if isinstance(module, nn.Linear))
        alone = "no neighbour in its module has as many inputs and is quantised alike, with a scale for each row"
        weights = {path: model.get_submodule(path).weight for path in others if path not in stored}
        return Prepared(stored, {path: alone for path, weight in weights.items() if _is_torchao_s(weight)})
    if provider not in ("auto", "aiter", "reference"):
        raise ValueError(f"provider={provider!r}: shuffled weights are read by auto, aiter and reference")
    if product not in PRODUCTS:
        raise ValueError(f"product={product!r}: weights are stored for {', '.join(PRODUCTS)} or side_by_side")
    name = "aiter" if provider == "auto" else provider
    missing = BRIDGE_PROVIDERS[name].missing()
    if provider == "aiter" and missing is not None:
        raise RuntimeError(f"provider='aiter' cannot run here: {missing}")
    general = [missing] if missing is not None else []
    if provider == "auto":
        general += config.against(PRODUCTS[product][ROWS_OF])
    floats = (parameter.dtype for parameter in model.parameters() if parameter.dtype in HALVES)
    result = next(floats, torch.bfloat16)
    layers, refused = [], {}
    for modules in _readers(model).values():
        weight: Any = modules[0][1].weight
        if not _is_shuffled(weight):
            layer = _described(modules[0][1], result, name)
            op = PRODUCTS[product].get(layer.granularity or "")
            why = [*general, *_objections(layer, [m.bias for _, m in modules], op, product, name, asked=not general)]
            if why or op is None:
                refused |= dict.fromkeys((path for path, _ in modules), "; ".join(why))
                continue
            tiles = shuffled(layer.values.contiguous())
            new = ShuffledWeight(tiles, layer.scale, layer.dtype, layer.quantise, layer.restore, op, name)
            _replace(modules, new)
        layers += [path for path, _ in modules]
    return Prepared(tuple(layers), refused)


def unprepare(model: nn.Module) -> tuple[str, ...]:
    """Give the linear layers that ``prepare`` took their weights back, bit for bit; changes the model.

    Args:
        model: maybe with layers that ``prepare`` took.

    Returns:
        The layers whose weights are row by row again.
    """
    restored = []
    for modules in _readers(model).values():
        weight: Any = modules[0][1].weight.data
        if _is_shuffled(weight):
            _replace(modules, weight.restore(unshuffled(weight.tiles), weight.scale))
            restored += [path for path, _ in modules]
    return tuple(restored)


def _readers(model: nn.Module) -> dict[int, list[tuple[str, nn.Linear]]]:
    """The linear layers with FP8 weights, by weight, which modules may share."""
    readers: dict[int, list[tuple[str, nn.Linear]]] = {}
    linear = ((path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear))
    for path, module in linear:
        kinds = (_is_torchao_s(module.weight), _is_transformers(module), _is_shuffled(module.weight))
        if any(kinds):
            readers.setdefault(id(module.weight), []).append((path, module))
    return readers


def _replace(modules: Sequence[tuple[str, nn.Linear]], weight: Tensor) -> None:
    parameter = nn.Parameter(weight, requires_grad=False)
    for _, module in modules:
        module.weight = parameter


def _is_shuffled(weight: Any) -> bool:
    return isinstance(weight, Tensor) and isinstance(weight.data, ShuffledWeight)


def _is_torchao_s(weight: Any) -> bool:
    """Whether it is torchao's tensor of FP8 values, which need not be installed."""
    return all(hasattr(weight, name) for name in ("qdata", "scale", "act_quant_kwargs"))


def _is_transformers(module: nn.Linear) -> bool:
    """Whether it is transformers' ``FP8Linear``, which need not be installed; one that was prepared is not."""
    return hasattr(module, "weight_scale_inv") and module.weight.element_size() == 1


def _described(module: nn.Linear, result: torch.dtype, provider: str) -> _Layer:
    weight: Any = module.weight
    if not _is_torchao_s(weight):
        return _of_transformers(module, result, provider)
    quantise = ByTorchAO(weight.act_quant_kwargs)
    restore = ToTorchAO(type(weight.data), weight.data.__tensor_flatten__()[1])
    layer = _Layer(weight.qdata, weight.scale, weight.dtype, quantise, restore)
    if weight.act_quant_kwargs is None:
        return layer._replace(against=("its activations are not quantised",))
    of_activations = weight.act_quant_kwargs.granularity
    kind = type(of_activations).__name__
    if layer.granularity == BLOCKS_OF and tuple(getattr(of_activations, "block_size", ())) == (1, BLOCK):
        return layer
    if kind != "PerRow":
        layer = layer._replace(against=(f"its activations have scales {kind}, not one for each row",))
    return layer


def _of_transformers(module: Any, result: torch.dtype, provider: str) -> _Layer:
    weight, scale = module.weight.data, module.weight_scale_inv.data
    against = []
    if tuple(module.block_size or ()) != (BLOCK, BLOCK):
        against.append(f"its blocks are {module.block_size}, not {BLOCK} x {BLOCK}")
    if module.activation_scheme != "dynamic":
        against.append(f"its activations have {module.activation_scheme} scales, not dynamic ones")
    if hasattr(module, "n_groups"):
        against.append(f"its weight is of {module.n_groups} products")
    if scale.dtype != torch.float32:
        against.append(f"its scales are {scale.dtype}, not torch.float32")
    return _Layer(weight, scale, result, ByGroups(weight.dtype, provider), ToValues(), tuple(against))


def _objections(
    layer: _Layer, biases: Sequence[Tensor | None], op: str | None, product: str, provider: str, asked: bool
) -> list[str]:
    """Every condition of a shuffled product that the layers of a weight do not meet; the provider is asked only if it
    is there, and its library tried only if the provider takes the layers."""
    n, k = layer.values.shape
    objections = list(layer.against)
    if layer.granularity is None or op is None:
        known = " or ".join(PRODUCTS[product])
        what = f"not one for each of {n} rows" if known == ROWS_OF else f"not one for each {known}"
        objections.append(f"its weight has scales {list(layer.scale.shape)}, {what}")
    if n % TILE[0] or k % TILE[1]:
        objections.append(f"its weight is {n} x {k}, not in multiples of {TILE[0]} x {TILE[1]}")
    if objections or not asked or op is None:
        return objections
    calls = [_call(layer, op, bias, rows) for bias in biases for rows in ROWS]
    found = [BRIDGE_PROVIDERS[provider].why_not(REGISTRY.bridge[op, frozenset()], call) for call in calls]
    if provider == "aiter" and op == "hipb_mm_fp8" and not any(found):
        from .providers.aiter import hipblaslt  # not before: loading it takes a while

        found = [hipblaslt.why_unsolved(call) for call in calls]
    return list(dict.fromkeys(why for why in found if why is not None))


def _call(layer: _Layer, op: str, bias: Tensor | None, rows: int) -> dict[str, Any]:
    """A call of the op as a prepared layer makes it, but for the values: whether there is a kernel for it does not
    depend on them, so the weight stands for its own tiles."""
    k = layer.values.shape[1]
    x = layer.values.new_zeros(rows, k)
    if op == "hipb_mm_fp8":
        return {
            "a": x,
            "b": layer.values.t(),
            "a_scale": layer.scale.new_ones(rows, 1),
            "b_scale": layer.scale.t(),
            "bias": bias,
            "dtype": layer.dtype,
            "b_is_shuffled": True,
        }
    of_x = (rows, 1 if layer.granularity == ROWS_OF else k // BLOCK)
    scales = {"x_scale": layer.scale.new_ones(of_x), "w_scale": layer.scale}
    return {"x": x, "w": layer.values, **scales, "dtype": layer.dtype}
