"""Attention of few queries, or with a copy of the cache for each head that reads it.

``scaled_dot_product_attention`` becomes another operator for each backend that PyTorch may choose. Before it the models
repeat the heads of the cache (``repeat_kv``, ``repeat_interleave``), which copies the cache.
"""

from __future__ import annotations

from functools import partial
from operator import getitem
from typing import Any

from torch import fx

from ..ops.attention import FEW
from ..reasons import Reason, Refusal
from .form import Completion, Form
from .fx_facts import FLOATS, Target, aten, dtype, readers, same_shape, same_size, shape
from .language import Attr, Call, Const, Found, Named, OneOf, Pattern, Var, anything
from .visible import Visible, is_mask, visible

NEVER = float("-inf")
# The operators of PyTorch's call, and the number that PyTorch writes for False into the mask of each.
CALLS = {
    "cpu": ("_scaled_dot_product_flash_attention_for_cpu", NEVER),
    "flash": ("_scaled_dot_product_flash_attention", NEVER),
    "efficient": ("_scaled_dot_product_efficient_attention", NEVER),
    "cudnn": ("_scaled_dot_product_cudnn_attention", -65504.0),  # the least of float16; rounded to bfloat16 -65536
    "overrideable": ("_scaled_dot_product_fused_attention_overrideable", NEVER),
}
RESHAPES: tuple[Target, ...] = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
ANY = anything()
NOTHING = Attr("", lambda node, value: value is None)
THIRD = Attr("", lambda node, dim: dim in (2, -3))


def repeated(name: str) -> Pattern:
    """The heads of a cache, each as often as queries share it, one after another; or the cache as it is."""
    spread = Call((aten.expand.default,), (Call((aten.unsqueeze.default,), (Var(name), THIRD)), ANY))
    spread = Named(f"spread_{name}", spread)
    copied = Call(RESHAPES, (OneOf((Call((aten.clone.default,), (spread, ANY)), spread)), ANY))
    one_head = Call((aten.expand.default,), (Var(name), ANY))
    return OneOf((Named(f"heads_{name}", copied), Named(f"heads_{name}", one_head), Var(name)))


ARGUMENTS: dict[str, Pattern] = {
    "query": Var("q"),
    "key": repeated("k"),
    "value": repeated("v"),
    **dict.fromkeys(("attn_mask", "attn_bias"), OneOf((NOTHING, Var("mask")))),
    "dropout_p": anything("dropout"),
    "scale": Attr("scale", lambda node, value: value is None or type(value) in (int, float)),
    # what else is returned, which nothing may read
    **dict.fromkeys(("compute_log_sumexp", "return_debug_mask"), ANY),
}


def _result(operator: str, causal: bool) -> Pattern:
    """The first result of PyTorch's call for a backend; what is not known of its arguments has the default."""

    def default(argument: Any) -> Attr:
        return Attr("", lambda node, value: value == argument.default_value)

    target = getattr(aten, operator).default
    known = {**ARGUMENTS, "is_causal": Const(causal)}
    given = [known.get(argument.name) or default(argument) for argument in target._schema.arguments]
    return Call((getitem,), (Call((target,), tuple(given)), Const(0)))


def _copies(found: Found, name: str) -> bool | None:
    """Whether a cache is copied for the heads that read it; None if its heads are in another order than the op's."""
    heads, spread = found.named.get(f"heads_{name}"), found.named.get(f"spread_{name}")
    if heads is None:
        return False
    batch, own, *rest = shape(found.inputs[name])
    if spread is None:
        repeats = same_size(own, 1) and same_shape(shape(heads), (batch, shape(heads)[1], *rest))
        return False if repeats else None
    times = shape(spread)[2]
    repeats = same_shape(shape(spread), (batch, own, times, *rest))
    return True if repeats and same_shape(shape(heads), (batch, own * times, *rest)) else None


def _complete(root: fx.Node, found: Found, false: float) -> Completion | str:
    q, k, v = (found.inputs[name] for name in "qkv")
    if any(len(shape(node)) != 4 for node in (q, k, v)):
        return "queries, keys and values do not have four dimensions"
    batch, heads, queries, dim = shape(q)
    _, key_heads, slots, _ = shape(k)
    if any(dtype(node) not in FLOATS or dtype(node) is not dtype(root) for node in (q, k, v)):
        return f"queries, keys and values are {dtype(q)}, {dtype(k)} and {dtype(v)}"
    sizes = (batch, key_heads, slots, dim)
    if not (same_shape(shape(k), sizes) and same_shape(shape(v), sizes) and same_size(heads % key_heads, 0)):
        return f"queries {list(shape(q))}, keys {list(shape(k))} and values {list(shape(v))} do not go together"
    copies = [_copies(found, name) for name in "kv"]
    if None in copies or not same_shape(shape(root), shape(q)):
        return "the heads of the cache are not repeated one after another"
    few = isinstance(queries, int) and queries <= FEW
    if not few and not any(copies):
        return f"{queries} queries are no step of decoding, and nothing is copied for them"
    scale = found.attributes["scale"]
    if scale is None and not isinstance(dim, int):
        return f"the scale follows from the head size {dim}, which only a run will tell"
    seen = _seen(found.inputs.get("mask"), (batch, heads, queries, slots), q, false)
    if seen.mask is not None and not is_mask(seen.mask, (batch, heads, queries, slots)):
        return f"the mask has shape {list(shape(seen.mask))}"
    inputs = {"q": q, "k": k, "v": v, "mask": seen.mask, "position": seen.position}
    given = {
        "mask": seen.mask is not None,
        "position": seen.position is not None,
        "window": seen.window > 0,
    }
    return Completion(
        {"scale": float(dim**-0.5 if scale is None else scale), "window": seen.window, "softcap": 0.0},
        frozenset(name for name, is_given in given.items() if is_given),
        refusal=_refusal(root, found),
        inputs={name: node for name, node in inputs.items() if node is not None},
        nodes=seen.nodes,
    )


def _seen(mask: fx.Node | None, sizes: tuple[Any, ...], q: fx.Node, false: float) -> Visible:
    """What the mask leaves visible; with a position only if that is where the queries are."""
    if mask is None:
        return Visible(None)
    seen = visible(mask, sizes, false)
    elsewhere = seen.position is not None and seen.position.meta["val"].device != q.meta["val"].device
    return Visible(mask) if elsewhere else seen


def _refusal(root: fx.Node, found: Found) -> Refusal | None:
    """Why no op computes an attention that has the form, or None."""
    dropout = found.attributes.get("dropout", 0)
    if dropout != 0:
        return Refusal(Reason.ATTENTION, f"its weights are dropped out (p = {dropout})")
    (call,) = root.all_input_nodes
    other = next((reader for reader in readers(call) if reader is not root), None)
    if other is not None:
        return Refusal(Reason.ATTENTION, f"{other.name} reads what else {call.name} returns")
    return None


def _form(kind: str, name: str, operator: str, false: float, causal: bool = False) -> Form:
    complete = partial(_complete, false=false)
    alone = Refusal(Reason.ATTENTION, "by is_causal the first query sees the first key alone, wherever the cache ends")
    return Form(kind, name, _result(operator, causal), output="y", complete=complete, alone=alone)


FORMS = tuple(
    form
    for name, (operator, false) in CALLS.items()
    if hasattr(aten, operator)
    for form in (
        # the kind tells apart what the op's reference computes bit by bit
        _form("cpu_attention" if name == "cpu" else "attention", name, operator, false),
        _form("causal_attention", name, operator, false, causal=True),
    )
)
