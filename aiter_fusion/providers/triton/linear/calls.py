"""Calls of ``fp8_linear``: what the kernels take, where they pay, and calls outside of Inductor's launches.

A compiled graph with a symbolic number of rows chooses here, at every call. So little may take time here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ....domains import FLAG, Each, OneOf, Tensors
from ....op import FusedOp
from ....scaled_product import BLOCKS, MOST, granularity, is_direct
from ...terms import Terms
from ..gpu import gpu_of
from ..jit import native_fp8
from ..launch import Launches, flat
from ..launcher import Launcher, alignment, prepare
from . import launches, rules

F32 = torch.float32
FLOATS = (torch.bfloat16, torch.float16, F32)
FP8 = Tensors((torch.float8_e4m3fn, torch.float8_e4m3fnuz))
TERMS = Terms(
    {
        "x": FP8,
        "weights": Each(FP8, MOST),
        "x_scale": Tensors((F32,)),
        "weight_scales": Each(Tensors((F32,)), MOST),
        "biases": Each(Tensors(FLOATS, optional=True), MOST),
        "dtype": OneOf(FLOATS),
        "fast_accum": FLAG,
    }
)
# Strides of 16 bytes, which ``torch._scaled_mm`` demands of operands, are what kernels load at a time.
ALIGNMENT = 16


def refuse(arguments: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot compute a call that their terms allow (tensors may be fakes), or None."""
    x, x_scale = arguments["x"], arguments["x_scale"]
    weights: Sequence[Tensor] = arguments["weights"]
    scales: Sequence[Tensor] = arguments["weight_scales"]
    if x.device.type != "cuda":
        return f"the tensors are on {x.device.type}, and its kernels are for GPUs"
    native = native_fp8(x.device.index or 0)
    if x.dtype != native:
        return f"x is {x.dtype}, and this GPU multiplies {native}"
    for name, tensor in flat(arguments).items():
        if isinstance(tensor, Tensor) and tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
    k = x.shape[1]
    if not isinstance(k, int) or not all(isinstance(size, int) for weight in weights for size in weight.shape):
        return "sizes of the weights are known only at run time"
    if k == 0 or k % ALIGNMENT or not statically_known_true(x.stride(1) == 1):
        return (
            f"x has {k} columns, {x.stride(1)} elements apart, and its kernels need a multiple of {ALIGNMENT}, 1 apart"
        )
    if not statically_known_true(x.stride(0) % ALIGNMENT == 0) and not statically_known_true(x.shape[0] == 1):
        return f"the rows of x are {x.stride(0)} elements apart, and its kernels need a multiple of {ALIGNMENT}"
    kinds = set()
    for index, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        if weight.stride(0) != 1 or weight.stride(1) % ALIGNMENT:
            return (
                f"weights[{index}] has strides {tuple(weight.stride())}, and its kernels need 1 and a multiple of "
                f"{ALIGNMENT}"
            )
        kinds.add(granularity(x, weight, x_scale, scale))
        if scale.numel() != 1 and apart(scale) != apart(scales[0]):
            return (
                f"weight_scales[{index}] has strides {tuple(scale.stride())}, and weight_scales[0] "
                f"{tuple(scales[0].stride())}"
            )
    if None in kinds or len(kinds) > 1:
        shapes = ", ".join(str(list(scale.shape)) for scale in scales)
        return f"scales of {list(x_scale.shape)} and {shapes} are not of one tensor, row or block each"
    if BLOCKS in kinds and k % rules.BLOCK:
        return f"x has {k} columns, and scales by block need a multiple of {rules.BLOCK}"
    if BLOCKS in kinds and not isinstance(x.shape[0], int):
        return "the number of rows is known only at run time, and for many rows there is no product by blocks to call"
    if isinstance(x.shape[0], int) and x.shape[0] == 0:
        return "x has no rows, and its kernels need one"
    return None


def apart(scale: Tensor) -> tuple[Any, ...]:
    """How far elements are from each other in memory; along a dimension of one element that means nothing."""
    return tuple(step for n, step in zip(scale.shape, scale.stride(), strict=True) if n != 1)


def unmeasured(arguments: Mapping[str, Any]) -> str | None:
    """Why nothing is known about the speed of a call on its GPU, or None: the package's tables are of some GPUs, and
    hold for all sizes; what ``tune --linear`` measured holds for the sizes that it was given."""
    x = arguments["x"]
    name = torch.cuda.get_device_name(x.device.index or 0)
    ns = [weight.shape[1] for weight in arguments["weights"]]
    if name in rules.MEASURED or rules.is_tuned(x.shape[1], ns, x.shape[0], arguments["fast_accum"]):
        return None
    size = f"{x.shape[1]}x{','.join(map(str, ns))}"
    return f"{size} was not measured on {name}: run 'aiter-fusion tune --linear {size}' there, or name the provider"


def is_known(arguments: Mapping[str, Any]) -> bool:
    """Whether the number of rows is known; else every call chooses its launches."""
    return isinstance(arguments["x"].shape[0], int)


def has_site(arguments: Mapping[str, Any]) -> bool:
    """Whether nothing of a call is symbolic but how many rows its tensors have."""
    tensors = [value for value in flat(arguments).values() if isinstance(value, Tensor)]
    return all(isinstance(size, int) for tensor in tensors for size in (*tensor.shape[1:], *tensor.stride()))


def site(op: FusedOp) -> Site:
    """All calls of a site come from one place, where only rows are symbolic."""
    return Site(op)


def of(arguments: Mapping[str, Any]) -> Launches:
    """The launches of a call with a known number of rows, on its GPU."""
    return launches.of(arguments, gpu_of(arguments["x"].device.index or 0))


def slower(arguments: Mapping[str, Any]) -> str | None:
    """Why separate calls of ``torch._scaled_mm`` are as fast as a call, by recorded measurements, or None. A symbolic
    number of rows is decided at every call."""
    x = arguments["x"]
    if not isinstance(x.shape[0], int) or _pays(arguments, x.shape[0], x.device.index or 0):
        return None
    total = sum(weight.shape[1] for weight in arguments["weights"])
    return f"torch._scaled_mm is as fast for {x.shape[0]} rows x {x.shape[1]} by {total} columns in all"


def _pays(arguments: Mapping[str, Any], rows: int, device: int) -> bool:
    """Whether the kernels are faster than separate calls. Of an unmeasured GPU it is what the tables say."""
    k, ns = arguments["x"].shape[1], [weight.shape[1] for weight in arguments["weights"]]
    gpu = gpu_of(device)
    return rules.pays(k, ns, rows, arguments["fast_accum"], gpu.multiprocessors)


def run(op: FusedOp, **arguments: Any) -> dict[str, Tensor]:
    """Compute a call, by the kernels or, where they do not pay, by the products that the graph had.

    Raises:
        RuntimeError: a kernel would be compiled while a CUDA graph is captured.
    """
    x: Tensor = arguments["x"]
    rows = x.shape[0]
    if rows == 0 or (rows > rules.MOST_ROWS and not launches.is_blocked(arguments)):
        return op.reference(**arguments)
    tensors = _tensors(arguments)
    pointers = [tensor.data_ptr() for tensor in tensors]
    key = (
        arguments["dtype"],
        arguments["fast_accum"],
        x.device,
        tuple([bias is None for bias in arguments["biases"]]),
        tuple([tensor.shape for tensor in tensors]),
        tuple([tensor.stride() for tensor in tensors]),
        alignment(pointers),
    )
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = _prepared[key] = _prepare(op, arguments)
    return prepared(pointers) if prepared is not None else op.reference(**arguments)


# The launchers of calls by what they depend on; None where PyTorch's products are called.
_prepared: dict[tuple[Any, ...], Launcher | None] = {}


class Site:
    """One place of a compiled graph that calls the op with a number of rows which is known only then.

    The generated code has such an object and calls it in place of the op, whose dispatch takes longer than a launch.
    Its calls differ in rows and pointers alone, so everything else is looked up once.
    """

    def __init__(self, op: FusedOp) -> None:
        self._op = op
        self._launchers: dict[tuple[int, tuple[bool, ...]], Launcher | None] = {}
        self._is_direct: bool | None = None

    def __call__(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        x_scale: Tensor,
        weight_scales: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        dtype: torch.dtype,
        fast_accum: bool,
        provider: str,
    ) -> list[Tensor]:
        """The op's outputs."""
        rows = x.shape[0]
        values = (x, weights, x_scale, weight_scales, biases, dtype, fast_accum)
        if 0 < rows <= rules.MOST_ROWS:
            tensors = [x, x_scale, *weights, *weight_scales, *[bias for bias in biases if bias is not None]]
            pointers = [tensor.data_ptr() for tensor in tensors]
            key = rows, alignment(pointers)
            if key not in self._launchers:
                self._launchers[key] = _prepare(self._op, dict(zip(self._op.arguments, values, strict=True)))
            launch = self._launchers[key]
            if launch is not None:
                return list(launch(pointers).values())
        elif self._is_direct:
            layers = zip(weights, weight_scales, biases, strict=True)
            return [
                torch.ops.aten._scaled_mm.default(x, w, x_scale, scale, b, None, dtype, fast_accum)
                for w, scale, b in layers
            ]
        elif self._is_direct is None and rows:
            self._is_direct = is_direct(x, weights, x_scale, weight_scales)
        return list(self._op.reference(*values).values())


def _prepare(op: FusedOp, arguments: Mapping[str, Any]) -> Launcher | None:
    if refuse(arguments) is not None:
        return None
    x = arguments["x"]
    # by block, PyTorch's product takes only some scales, and the reference of the others is slow
    pays = launches.is_blocked(arguments) or _pays(arguments, x.shape[0], x.device.index or 0)
    return launcher(op, arguments) if pays else None


def launcher(op: FusedOp, arguments: Mapping[str, Any]) -> Launcher:
    """Compile the kernels of a call, for all calls with tensors of the same shapes (``pointers``)."""
    return prepare(op, arguments, of(arguments), _ordered(arguments))


def _tensors(arguments: Mapping[str, Any]) -> list[Tensor]:
    given = [bias for bias in arguments["biases"] if bias is not None]
    return [arguments["x"], arguments["x_scale"], *arguments["weights"], *arguments["weight_scales"], *given]


def pointers(arguments: Mapping[str, Any]) -> list[int]:
    """What a launcher takes."""
    return [tensor.data_ptr() for tensor in _tensors(arguments)]


def _ordered(arguments: Mapping[str, Any]) -> list[str]:
    """The names of the tensors of ``_tensors``."""
    count = range(len(arguments["weights"]))
    given = [f"biases.{i}" for i in count if arguments["biases"][i] is not None]
    return ["x", "x_scale", *(f"weights.{i}" for i in count), *(f"weight_scales.{i}" for i in count), *given]
