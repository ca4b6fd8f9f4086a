"""Which chains of records become which fused op. Longer chains are tried first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from .. import config
from . import act_mul, all_reduce, fp8_linear, fp8_quant, rms_norm
from .language import Form, Fusion, same_size, shape

# Features that need a level above 1: outputs that the graph still reads besides q and scale, Gemma's weight, static
# scales.
LEVELS = {"value": 2, "offset": 2, "static": 2}

Fits = Callable[[Mapping[str, Any], fx.Node], str | None]


def blocks_fit_rows(attributes: Mapping[str, Any], value: fx.Node) -> str | None:
    """A block of the quantiser must not span several rows of the value that it reads."""
    block, width = attributes["block"], shape(value)[-1]
    if block == 0 or same_size(width % block, 0):
        return None
    return f"scales are for blocks of {block}, which its rows of {width} do not divide into"


def variant(features: frozenset[str], attributes: Mapping[str, Any], value: fx.Node) -> str:
    """E.g. ``add+token``, ``packed+group128+value``, ``static``, ``add+unquantised``."""
    block = attributes.get("block")
    if "static" in features:
        granularity = "static"
    elif block is None:
        granularity = "unquantised"
    else:
        granularity = fp8_quant.granularity(block, shape(value)[-1])
    before = [name for name in ("pair", "add", "packed", "offset") if name in features]
    after = [name for name in ("value", "reduced") if name in features]
    return "+".join([*before, granularity, *after])


def linear_variant(features: frozenset[str], attributes: Mapping[str, Any], value: fx.Node) -> str:
    """``rowwise`` or ``blockwise``."""
    return "+".join(sorted(features))


def _linear(kind: str, op: str, *preferences: str) -> Fusion:
    """A matrix product, which alone is worth an opaque op only where AITER computes it."""
    return Fusion(
        "fp8_linear",
        (kind,),
        linear_variant,
        levels={"rowwise": 3, "blockwise": 3},
        op=op,
        only=frozenset({"aiter"}),
        against=lambda: config.against(*preferences),
    )


def _quantised(family: str, *chain: str) -> Fusion:
    return Fusion(family, (*chain, "fp8_quant"), variant, LEVELS, blocks_fit_rows)


def _reduced(op: str, *chain: str, fits: Fits = lambda attributes, value: None) -> Fusion:
    return Fusion(
        "all_reduce_rms_norm",
        ("all_reduce", *chain),
        variant,
        LEVELS,
        fits,
        level=3,
        one=("group",),
        jointly=True,
        op=op,
    )


FUSIONS: tuple[Fusion, ...] = (
    _reduced("all_reduce_rms_norm_quant", "residual_add", "rms_norm", "fp8_quant", fits=blocks_fit_rows),
    _reduced("all_reduce_rms_norm_quant", "rms_norm", "fp8_quant", fits=blocks_fit_rows),
    _reduced("all_reduce_rms_norm", "residual_add", "rms_norm"),
    _reduced("all_reduce_rms_norm", "rms_norm"),
    _quantised("rms_norm_quant", "residual_add", "rms_norm"),
    _quantised("rms_norm_quant", "rms_norm"),
    _quantised("act_mul_quant", "act_mul"),
    _linear("scaled_mm", "hipb_mm_fp8", "AITER", "LINEAR", "LINEAR_HIPBMM"),
    _linear("scaled_mm", "gemm_a8w8"),
    _linear("block_mm", "gemm_a8w8_blockscale"),
)

# Earlier forms win where two explain the same node.
FORMS: tuple[Form, ...] = (
    *rms_norm.FORMS,
    *act_mul.FORMS,
    *fp8_quant.FORMS,
    *(all_reduce.FORMS if all_reduce.WAIT else ()),
    *rms_norm.RESIDUAL_FORMS,
    *fp8_linear.FORMS,
)


def forms_of(fusions: Sequence[Fusion]) -> tuple[Form, ...]:
    """The forms that can be part of any of these fusions, and those that serve them."""
    kinds = {kind for fusion in fusions for kind in fusion.chain}
    return tuple(form for form in (*FORMS, *fp8_linear.late_forms()) if form.kind in kinds)
