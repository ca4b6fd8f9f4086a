"""Which chains of records become which fused op, and all forms. Longer chains are tried first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from .. import config
from ..families import FAMILIES
from ..registry import REGISTRY
from ..scaled_product import MOST
from ..stage import Family
from . import (
    act,
    act_mul,
    all_reduce,
    attention,
    cat,
    fp8_linear,
    fp8_quant,
    gate,
    layer_norm,
    modulate,
    opaque,
    rms_norm,
)
from .form import Form, Fusion, Join
from .fx_facts import shape


def linear_variant(features: frozenset[str], attributes: Mapping[str, Any], value: fx.Node) -> str:
    """``rowwise``, ``tensorwise`` or ``blockwise``."""
    return "+".join(sorted(features))


def _linear(kind: str, op: str, unasked: bool = True) -> Fusion:
    """A matrix product, which alone is worth an opaque op only where AITER computes it; ``unasked``: whatever the
    environment prefers of the op, since no other product is there for the same records."""
    return Fusion(
        "fp8_linear",
        (kind,),
        linear_variant,
        levels={"rowwise": 3, "blockwise": 3},
        op=op,
        only=frozenset({"aiter"}),
        against=list if unasked else lambda: config.against(op),
    )


LISTS = {"weights": "b", "weight_scales": "w_scale", "biases": "bias"}
# As ``_scaled_mm`` has its operands, and as torchao's product by blocks has them.
JOIN = Join(LISTS, MOST)
JOIN_BLOCKS = Join(
    {**LISTS, "weights": "w"},
    MOST,
    permuted={"weights": (1, 0), "weight_scales": (1, 0)},
    reshaped={"x_scale": fp8_linear.block_scales},
)


def _joined(
    kind: str, join: Join, exact: bool = True, only: frozenset[str] = frozenset({"triton", "reference"})
) -> Fusion:
    """Matrix products of one value as one op."""
    return Fusion("fp8_linear", (kind,), linear_variant, level=3, op="fp8_linear", only=only, join=join, exact=exact)


def _side_by_side(kind: str, join: Join) -> Fusion:
    """The same by AITER, which gains by it only if the weights lie side by side: that is for the user to prefer."""
    fusion = _joined(kind, join, only=frozenset({"aiter"}))
    return replace(fusion, against=lambda: config.against("fp8_linear"))


def attention_variant(features: frozenset[str], attributes: Mapping[str, Any], value: fx.Node) -> str:
    """What says which keys a query sees (``mask+position``, ``position+window``), or ``all``; and ``softcap``."""
    return "+".join(sorted(features)) or "all"


def _attention(kind: str, exact: bool) -> Fusion:
    only = frozenset({"aiter", "triton", "reference"})
    return Fusion("decode_attention", (kind,), attention_variant, level=3, only=only, exact=exact)


def rows(family: Family) -> Iterator[Fusion]:
    """The chains of records that a family's ops replace."""
    for chain in family.chains():
        stages = {stage.kind: stage for row in family.rows() for stage in row}
        row = [stages[kind] for kind in chain]
        yield Fusion(
            family.name,
            chain,
            variant=lambda features, attributes, value: family.variant(features, attributes, shape(value)),
            levels=family.levels,
            fits=lambda attributes, value, last=row[-1]: last.fits(attributes, shape(value)),
            level=family.level,
            one=tuple(name for stage in row for name in stage.one),
            jointly=any(stage.collective for stage in row),
            op=family.op,
            features=family.features,
        )


for _form in (  # earlier ones win where two explain the same node
    *gate.gated(rms_norm.FORMS),
    *rms_norm.FORMS,
    *layer_norm.FORMS,
    *modulate.modulated((*rms_norm.FORMS, *layer_norm.FORMS)),
    *act_mul.FORMS,
    *act.FORMS,
    *act_mul.SERVING_FORMS,
    *cat.FORMS,
    *fp8_quant.FORMS,
    *opaque.FORMS,
    *(all_reduce.FORMS if all_reduce.WAIT else ()),
    *rms_norm.RESIDUAL_FORMS,
    *fp8_linear.FORMS,
    *attention.FORMS,
):
    REGISTRY.register(_form)
for _fusion in (
    *(row for family in FAMILIES for row in rows(family)),
    _side_by_side("scaled_mm", JOIN),
    _side_by_side("block_mm", JOIN_BLOCKS),
    _linear("scaled_mm", "hipb_mm_fp8", unasked=False),
    _linear("scaled_mm", "gemm_a8w8"),
    _linear("block_mm", "gemm_a8w8_blockscale"),
    _joined("scaled_mm", JOIN),
    _joined("product", JOIN),
    _joined("block_mm", JOIN_BLOCKS, exact=False),  # torchao's kernel sums in an order of its own
    _attention("cpu_attention", exact=True),
    _attention("attention", exact=False),
):
    REGISTRY.register(_fusion)


def forms_of(fusions: Sequence[Fusion]) -> tuple[Form, ...]:
    """The forms to look for: all but those whose kind is part of fusions that nobody can take."""
    wanted = {kind for fusion in fusions for kind in fusion.chain}
    unwanted = {kind for fusion in REGISTRY.fusions.values() for kind in fusion.chain} - wanted
    return tuple(form for form in REGISTRY.forms.values() if form.kind not in unwanted)
