"""Attention of few queries, or with a copy of the cache for each head that reads it.

``scaled_dot_product_attention`` becomes another operator for each backend that PyTorch may choose. Before it the models
repeat the heads of the cache (``repeat_kv``, ``repeat_interleave``), which copies the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..ops.attention import FEW
from ..reasons import Reason, Refusal
from .form import UNQUANTISED, Completion, Form
from .fx_facts import FLOATS, HALVES, Target, aten, dtype, readers, same_shape, same_size, shape
from .language import (
    Attr,
    Call,
    Const,
    Found,
    Items,
    Named,
    OneOf,
    Pattern,
    Same,
    Var,
    add,
    anything,
    convert_to,
    in_float32,
    last_dim,
    mul,
    number,
)
from .visible import Visible, is_mask, visible

F32 = torch.float32
NEVER = float("-inf")
# The operators of PyTorch's call.
CALLS = {
    "cpu": "_scaled_dot_product_flash_attention_for_cpu",
    "flash": "_scaled_dot_product_flash_attention",
    "efficient": "_scaled_dot_product_efficient_attention",
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "overrideable": "_scaled_dot_product_fused_attention_overrideable",
}
# The numbers that PyTorch writes for False into a mask; for cuDNN the least of float16, which bfloat16 rounds.
FALSE = (NEVER,)
FALSE_FOR = {"cudnn": (NEVER, -65504.0, -65536.0)}
RESHAPES: tuple[Target, ...] = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
ANY = anything()
NOTHING = Attr("", lambda node, value: value is None)
LAST = Attr("", lambda node, dim: dim in (3, -1))
THIRD = Attr("", lambda node, dim: dim in (2, -3))


def repeated(name: str, cache: Pattern | None = None) -> Pattern:
    """The heads of a cache, each as often as queries share it, one after another; or the cache as it is."""
    cache = cache or Var(name)
    spread = Call((aten.expand.default,), (Call((aten.unsqueeze.default,), (cache, THIRD)), ANY))
    copied = Call(RESHAPES, (_cloned(Named(f"spread_{name}", spread)), ANY))
    one_head = Call((aten.expand.default,), (cache, ANY))
    return OneOf((Named(f"heads_{name}", copied), Named(f"heads_{name}", one_head), cache))


def _cloned(of: Pattern) -> OneOf:
    return OneOf((Call((aten.clone.default,), (of, ANY)), of))


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

    def exactly(default: Any) -> Attr:
        return Attr("", lambda node, value: value == default)

    target = getattr(aten, operator).default
    known = {**ARGUMENTS, "is_causal": Const(causal)}
    given = [known.get(argument.name) or exactly(argument.default_value) for argument in target._schema.arguments]
    return Call((getitem,), (Call((target,), tuple(given)), Const(0)))


def _flat(name: str, of: Pattern) -> Pattern:
    """Batch and heads as one dimension, for a product of matrices."""
    return Named(f"flat_{name}", Call(RESHAPES, (_cloned(OneOf((Call((aten.expand.default,), (of, ANY)), of))), ANY)))


def _product(a: Pattern, b: Pattern) -> Call:
    return Call(RESHAPES, (Call((aten.bmm.default,), (a, b)), ANY))


def _transposed(of: Pattern) -> Call:
    return Call((aten.permute.default,), (of, Attr("", lambda node, dims: list(dims) == [0, 1, 3, 2])))


def _scores(q: Pattern, k: Pattern) -> Pattern:
    return Named("scores", _product(_flat("q", q), _flat("k", k)))


def _added(scores: Pattern) -> OneOf:
    return OneOf((add(scores, Var("mask")), scores))


def _softmax(scores: Pattern) -> Pattern:
    """In float32, as PyTorch decomposes it."""
    most = Call((aten.amax.default,), (Same("softmax"), last_dim(), Const(True)))
    shares = Call((aten.exp.default,), (Call((aten.sub.Tensor,), (Named("softmax", scores), most), dtype=F32),))
    total = Call((aten.sum.dim_IntList,), (Same("shares"), last_dim(), Const(True)))
    return Call((aten.div.Tensor,), (Named("shares", shares), total))


def _safe_softmax(scores: Pattern) -> Pattern:
    """The same, and 0 where every score is -inf."""
    finite = Call((aten.logical_not.default,), (Call((aten.eq.Scalar,), (Named("all", scores), Const(NEVER))),))
    none = Call((aten.logical_not.default,), (Call((aten.any.dim,), (finite, last_dim(), Const(True))),))
    zeros = Call((aten.full.default,), (ANY, Const(0), *(ANY,) * 4))
    return Call((aten.where.self,), (none, zeros, _softmax(Same("all"))))


def _weighted(weights: Pattern, v: Pattern) -> Pattern:
    return _product(_flat("weights", weights), _flat("v", v))


def _rounded(of: Pattern) -> OneOf:
    return OneOf((convert_to(of, "", HALVES), of))


def _wide(name: str) -> OneOf:
    return in_float32(Var(name))


# PyTorch's call without a kernel: the scale is divided among queries and keys.
MATH = _weighted(
    _safe_softmax(
        _added(
            _scores(
                Call((aten.mul.Scalar,), (_wide("q"), number("root"))),
                Call((aten.mul.Scalar,), (_transposed(repeated("k", _wide("k"))), number("root"))),
            )
        )
    ),
    repeated("v", _wide("v")),
)
# Attention as transformers has it without that call; Gemma2 bounds its scores.
SCORES = _scores(Var("q"), _transposed(repeated("k")))
SCALED = OneOf((mul(SCORES, number("scale")), Call((aten.div.Tensor,), (SCORES, number("divisor"))), SCORES))
CAPPED = mul(Call((aten.tanh.default,), (Call((aten.div.Tensor,), (SCALED, number("softcap"))),)), number("softcap"))
MASKED = OneOf((_added(CAPPED), _added(SCALED)))
EAGER = _weighted(_rounded(_softmax(in_float32(MASKED))), repeated("v"))
# GPT-OSS: one more score for each head, which is given, and to which no value belongs.
WITH_SINKS = Named("with_sinks", Call((aten.cat.default,), (Items((MASKED, Var("sinks"))), LAST)))
LARGEST = Call((getitem,), (Call((aten.max.dim,), (Same("with_sinks"), last_dim(), Const(True))), Const(0)))
SHIFTED = in_float32(Call((aten.sub.Tensor,), (WITH_SINKS, LARGEST)))
BUT_THE_LAST = Call((aten.slice.Tensor,), (_rounded(_softmax(SHIFTED)), last_dim(), Const(0), Const(-1)))
SINKS = _weighted(_cloned(BUT_THE_LAST), repeated("v"))


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


def _complete_call(root: fx.Node, found: Found, false: Sequence[float]) -> Completion | str:
    return _complete(root, found, found.attributes["scale"], false)


def _complete_causal(root: fx.Node, found: Found) -> Completion | str:
    """A prompt's attention. Nothing could be gained but the copies."""
    if not any(_copies(found, name) for name in "kv"):
        return "nothing is copied for it"
    return _complete(root, found, found.attributes["scale"])


def _complete_decomposed(root: fx.Node, found: Found) -> Completion | str:
    """The products are those of all heads, and the scale is the one that there is."""
    q, k = (found.inputs[name] for name in "qk")
    if len(shape(q)) != 4 or len(shape(k)) != 4:
        return "queries and keys do not have four dimensions"
    batch, heads, queries, dim = shape(q)
    slots = shape(k)[2]
    for name, sizes in {
        "q": (queries, dim),
        "k": (dim, slots),
        "weights": (queries, slots),
        "v": (slots, dim),
    }.items():
        if not same_shape(shape(found.named[f"flat_{name}"]), (batch * heads, *sizes)):
            return f"{found.named[f'flat_{name}'].name} is not of all heads"
    if not same_shape(shape(found.named["scores"]), (batch, heads, queries, slots)):
        return f"{found.named['scores'].name} is not of all heads"
    given = found.attributes
    scale = given["root"] ** 2 if "root" in given else given.get("scale", 1 / given.get("divisor", 1))
    return _complete(root, found, scale)


def _complete(root: fx.Node, found: Found, scale: float | None, false: Sequence[float] = FALSE) -> Completion | str:
    q, k, v = (found.inputs[name] for name in "qkv")
    if any(len(shape(node)) != 4 for node in (q, k, v)):
        return "queries, keys and values do not have four dimensions"
    batch, heads, queries, dim = shape(q)
    slots = shape(k)[2]
    if any(dtype(node) not in FLOATS or dtype(node) is not dtype(root) for node in (q, k, v)):
        return f"queries, keys and values are {dtype(q)}, {dtype(k)} and {dtype(v)}"
    if not _go_together(shape(q), shape(k), shape(v)):
        return f"queries {list(shape(q))}, keys {list(shape(k))} and values {list(shape(v))} do not go together"
    copies = [_copies(found, name) for name in "kv"]
    if None in copies or not same_shape(shape(root), shape(q)):
        return "the heads of the cache are not repeated one after another"
    few = isinstance(queries, int) and queries <= FEW
    if not few and not any(copies):
        return f"{queries} queries are no step of decoding, and nothing is copied for them"
    sizes = (batch, heads, queries, slots)
    seen = _seen(found.inputs.get("mask"), sizes, q, false)
    inputs = {"q": q, "k": k, "v": v, "mask": seen.mask, "position": seen.position}
    given = {
        "mask": seen.mask is not None,
        "position": seen.position is not None,
        "window": seen.window > 0,
        "softcap": "softcap" in found.attributes,
    }
    scale = dim**-0.5 if scale is None and isinstance(dim, int) else scale
    numbers = {"scale": scale, "softcap": found.attributes.get("softcap", 0)}
    return Completion(
        {"window": seen.window, **{name: float(number) for name, number in numbers.items() if number is not None}},
        frozenset(name for name, is_given in given.items() if is_given),
        refusal=_refusal(root, found, seen.mask, sizes, scale),
        inputs={name: node for name, node in inputs.items() if node is not None},
        nodes=seen.nodes,
    )


def _go_together(q: Sequence[Any], k: Sequence[Any], v: Sequence[Any]) -> bool:
    """Whether the op takes these shapes. That there are as many values as keys, the call itself demands: of caches that
    grow, it is known no other way."""
    batch, heads, _, dim = q
    alike = all(same_shape((own[0], own[1], own[3]), (batch, k[1], dim)) for own in (k, v))
    return alike and not statically_known_true(k[2] != v[2]) and same_size(heads % k[1], 0)


def _seen(mask: fx.Node | None, sizes: tuple[Any, ...], q: fx.Node, false: Sequence[float]) -> Visible:
    """What the mask leaves visible; with a position only if that is where the queries are."""
    if mask is None:
        return Visible(None)
    seen = visible(mask, sizes, false)
    elsewhere = seen.position is not None and seen.position.meta["val"].device != q.meta["val"].device
    return Visible(mask) if elsewhere else seen


def _refusal(
    root: fx.Node, found: Found, mask: fx.Node | None, sizes: Sequence[Any], scale: float | None
) -> Refusal | None:
    """Why no op computes an attention that has the form, or None."""
    dropout = found.attributes.get("dropout", 0)
    if dropout != 0:
        return Refusal(Reason.ATTENTION, f"its weights are dropped out (p = {dropout})")
    if scale is None:
        return Refusal(
            Reason.ATTENTION, f"its scale follows from a head size that only a run will tell, of {root.name}"
        )
    for name in "qkv":
        node, stride = found.inputs[name], found.inputs[name].meta["val"].stride(-1)
        if not same_size(stride, 1):
            return Refusal(Reason.ATTENTION, f"the elements of {node.name}'s rows are {stride} apart")
    if mask is not None and not is_mask(mask, sizes):
        return Refusal(Reason.ATTENTION, f"its mask has shape {list(shape(mask))}, of attention {list(sizes)}")
    (call,) = root.all_input_nodes
    several = root.target is getitem
    other = next((reader for reader in readers(call) if several and reader is not root), None)
    if other is not None:
        return Refusal(Reason.ATTENTION, f"{other.name} reads what else {call.name} returns")
    return None


ALIGNED = Refusal(Reason.ATTENTION, "by is_causal the first query sees the first key alone, wherever the cache ends")
SINK = Refusal(Reason.ATTENTION, "its softmax has sinks, which no op takes")


def _form(kind: str, name: str, pattern: Pattern, complete: Any, alone: Refusal = UNQUANTISED) -> Form:
    return Form(kind, name, pattern, output="y", complete=complete, alone=alone)


def _calls() -> Iterator[Form]:
    """Those that this version of PyTorch has. The kind tells apart what the op's reference computes bit by bit."""
    for name, operator in CALLS.items():
        if hasattr(aten, operator):
            complete = partial(_complete_call, false=FALSE_FOR.get(name, FALSE))
            kind = "cpu_attention" if name == "cpu" else "attention"
            yield _form(kind, name, _result(operator, causal=False), complete)
            yield _form("causal_attention", name, _result(operator, causal=True), _complete_causal, ALIGNED)


FORMS = (
    *_calls(),
    _form("attention", "math", _rounded(MATH), _complete_decomposed),
    _form("attention", "eager", EAGER, _complete_decomposed),
    _form("sink_attention", "eager", SINKS, _complete_decomposed, SINK),
)
