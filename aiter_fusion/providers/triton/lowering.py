"""Inside a compiled graph a fused op becomes kernels that Inductor launches itself, like a user's Triton kernels.

The op stays in the graph, and its name is in every dump; it is replaced in Inductor's last stage, from graph to code.
So a call costs as much as that of a generated kernel, where an opaque op goes through the dispatcher and costs several
times that; Inductor plans the outputs as its own buffers; and the kernels are compiled and cached with the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor import ir
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from ...op import FusedOp, Spec
from ...registry import REGISTRY
from . import launches
from .jit import kernel, nvidia
from .launch import Ref, flat

NAME = "triton"


class _Launch(ir.UserDefinedTritonKernel):
    """A kernel whose outputs are declared.

    For a user's kernel, Inductor compiles it once more and reads from its code which arguments it writes to. That takes
    longer than the rest of a site's compilation, and if it fails, Inductor assumes that all inputs are written to.
    """

    def __init__(
        self, kernel_idx: int, grid: Any, arguments: Mapping[str, Any], written: Sequence[str], dependent: bool
    ) -> None:
        given = {
            name: self.unwrap_storage_for_input(self.realize_input(value)) if isinstance(value, ir.TensorBox) else value
            for name, value in arguments.items()
        }
        inputs = [value for value in given.values() if isinstance(value, ir.IRNode)]
        self.device = inputs[0].get_device()
        constants = tuple(value for value in given.values() if not isinstance(value, ir.IRNode))
        super(ir.UserDefinedTritonKernel, self).__init__(
            None, ir.NoneLayout(device=self.device), inputs, constants, given
        )
        self.kernel_idx, self.grid, self.dependent = kernel_idx, grid, dependent
        function: Any = self.get_kernel_and_metadata()[0]
        self.ordered_kwargs_for_cpp_kernel = [name for name in function.arg_names if name in arguments]
        self.mutable_args = [arguments[name] for name in written]
        self.mutation_outputs = [
            ir.MutationOutput(ir.NoneLayout(device=self.device), written_to, self) for written_to in self.mutable_args
        ]
        V.graph.register_operation(self)

    def codegen(self, wrapper: Any) -> None:
        with _dependent(wrapper) if self.dependent else nullcontext():
            super().codegen(wrapper)

    def can_fuse_epilogue(self) -> bool:
        return False


class _Site(ir.FallbackKernel):
    """A call whose launches depend on sizes that are known only then. Generated Python calls an object of its own for
    it, since the dispatcher takes longer than a launch; generated code of another language calls the op."""

    def codegen(self, wrapper: Any) -> None:
        module = wrapper
        while hasattr(module, "parent_wrapper"):
            module = module.parent_wrapper
        if type(module) is PythonWrapperCodegen:
            op, name = cast("torch._ops.OpOverload", self.op_overload), f"aiter_fusion_{self.get_name()}"
            module.add_import_once(f"from {__name__} import site")
            module.header.writeline(f"{name} = site({op._schema.name!r}, {op._overloadname!r})")
            self.python_kernel_name = name
        super().codegen(wrapper)


def site(name: str, overload: str) -> Callable[..., Any]:
    """What generated code calls in place of an op.

    Args:
        name: the op's, with its namespace.
        overload: the overload's.
    """
    targets = {(op.target._schema.name, op.target._overloadname): op for op in REGISTRY.ops.values()}
    return launches.site(targets[name, overload])


@contextmanager
def _dependent(wrapper: Any) -> Iterator[None]:
    """Define kernels with the launch attribute ``launch_pdl``, which Inductor gives templates of its own and none of a
    user's kernels. Such a kernel is still correct without it, so where the text has another form, nothing happens."""
    define = wrapper.define_kernel

    def with_attribute(name: str, body: str, *more: Any, **named: Any) -> Any:
        return define(name, body.replace("triton_meta={", "triton_meta={'launch_pdl': True, ", 1), *more, **named)

    wrapper.define_kernel = with_attribute
    try:
        yield
    finally:
        del wrapper.define_kernel


_QUANTISED = ("q", "q2", "q3", "scale_out", "scale2_out", "scale3_out", "value_out", "residual_out", "maxima_out")
# The arguments that each kernel writes to.
WRITTEN: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("norm_quant", "act_quant"), _QUANTISED),
    **dict.fromkeys(("fp8_gemv", "fp8_matmul", "fp8_combine"), ("y0", "y1", "y2", "y3", "partial_out")),
    **dict.fromkeys(("decode_attention", "attention_combine", "prefill_attention"), ("y", "partial_out", "sums_out")),
}


@functools.cache
def _configured(name: str, warps: int) -> Any:
    """A kernel with a number of warps, as an autotuned kernel with one configuration, which Inductor takes."""
    triton: Any = import_module("triton")
    return triton.autotune([triton.Config({}, num_warps=warps)], key=[])(kernel(name))


def _expression(value: Any) -> Any:
    """A size as Inductor's IR has it."""
    return value.node.expr if isinstance(value, torch.SymInt) else value


def _empty(spec: Spec, device: torch.device) -> ir.TensorBox:
    given, dtype, *order = spec
    sizes = [_expression(size) for size in given]
    dims = list(order[0]) if order else list(range(len(sizes)))
    packed = ir.FlexibleLayout.contiguous_strides([sizes[d] for d in dims])
    strides = [packed[dims.index(d)] for d in range(len(dims))]
    return lowerings[torch.ops.aten.empty_strided.default](sizes, strides, dtype=dtype, device=device)


def _resident(value: Any, device: torch.device) -> Any:
    """A tensor with memory, which a kernel can load. Freezing turns a tensor of one number into a constant without
    memory, so the number is stored on the GPU. Other numbers on the CPU stay there, because Inductor passes their
    values."""
    constant = value
    while isinstance(constant, ir.MutableBox):
        constant = constant.data
    if not isinstance(constant, ir.Constant):
        return value
    with _disable_current_modes():
        return V.graph.add_tensor_constant(torch.tensor(constant.value, dtype=constant.dtype, device=device))


def _lower(op: FusedOp, given: Mapping[str, Any], fakes: Mapping[str, Any]) -> ir.TensorBox | tuple[ir.TensorBox, ...]:
    """Add the kernels of a call to Inductor's graph, and return its outputs.

    Args:
        given: the arguments as Inductor's IR has them.
        fakes: the same as fake tensors.
    """
    first = next(value for value in fakes.values() if isinstance(value, Tensor))
    named = flat(fakes)
    tensors = {
        name: ir.ExternKernel.require_exact_strides(_resident(value, first.device), named[name].stride())
        for name, value in flat(given).items()
        if isinstance(named[name], Tensor)
    }
    outputs = {name: _empty(spec, first.device) for name, spec in op.returned(op.shape(**fakes)).items()}
    plan = launches.of(op, fakes, nvidia())
    scratch = {name: _empty(spec, first.device) for name, spec in plan.scratch.items()}
    known = tensors | scratch | outputs
    for launch in plan.launches:
        arguments = {
            name: known[value.name] if isinstance(value, Ref) else _expression(value)
            for name, value in launch.arguments.items()
        }
        written = [name for name in WRITTEN[launch.kernel] if isinstance(arguments.get(name), ir.TensorBox)]
        index = kernel_side_table.add_kernel(_configured(launch.kernel, launch.warps))
        _Launch(index, [(_expression(launch.grid), 1, 1)], arguments, written, launch.dependent)
    return op.pack(outputs)  # type: ignore[return-value]


def _lowering(op: FusedOp) -> Any:
    opaque = fallback_handler(op.target, add_to_fallback_set=False)
    names = [*op.arguments, "provider"]

    def called_there(*args: Any) -> Any:
        return tree_map_only(ir.IRNode, ir.TensorBox.create, _Site.create(op.target, *args))

    def lower(*args: Any) -> Any:
        if len(args) < len(names) or args[-1] != NAME:
            return opaque(*args)
        node = V.graph.current_node
        values = fx.map_arg(node.args, lambda value: value.meta["val"])
        fakes = dict(zip(op.arguments, values, strict=False))
        if not launches.is_known(op, fakes):
            return called_there(*args) if launches.has_site(op, fakes) else opaque(*args)
        return _lower(op, dict(zip(op.arguments, args, strict=False)), fakes)

    return lower


@functools.cache
def register() -> None:
    """Tell Inductor how to lower every fused op. Calls that were compiled for another provider stay opaque."""
    for op in REGISTRY.ops.values():
        if not op.is_collective:  # its algorithm is chosen when it is called
            register_lowering(op.target, type_promotion_kind=None)(_lowering(op))
