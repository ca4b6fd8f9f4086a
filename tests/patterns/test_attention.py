"""Attention of few queries: every spelling of its call and of its mask, what is proved of them, and what is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from aiter_fusion import config
from aiter_fusion.op import FusedOp
from aiter_fusion.ops.attention import ATTENTION, FEW, operands
from aiter_fusion.passes.manager import PassManager
from aiter_fusion.passes.oracle import copy_graph
from aiter_fusion.passes.verify import difference
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.report import BARE, REPLACED, SKIPPED, FusionReport
from support.checked import Checked, checked, fused

aten = torch.ops.aten
BATCH, HEADS, KEY_HEADS, SLOTS, DIM = 2, 8, 2, 24, 64
GROUPS = HEADS // KEY_HEADS
NAMES = tuple(ATTENTION.arguments)


def given(queries: int = 1, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    made = operands(BATCH, HEADS, KEY_HEADS, queries, SLOTS, DIM, dtype)
    return made["q"], made["k"], made["v"]


def attention_nodes(graph: fx.Graph) -> list[dict[str, Any]]:
    """The arguments of the fused ops."""
    calls = [node for node in graph.nodes if node.target is ATTENTION.target]
    return [dict(zip(NAMES, node.args, strict=False)) for node in calls]


def arguments(result: Checked) -> dict[str, Any]:
    """The arguments of the one fused op in the one graph."""
    (graph,) = result.oracle.graphs
    (found,) = attention_nodes(graph.after.graph)
    return found


# ---- the calls ----------------------------------------------------------------------------------------------


def repeat_kv(x: Tensor) -> Tensor:
    """As transformers has it."""
    return x[:, :, None].expand(BATCH, KEY_HEADS, GROUPS, SLOTS, DIM).reshape(BATCH, HEADS, SLOTS, DIM)


REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat_kv": repeat_kv,
    "repeat_interleave": lambda x: x.repeat_interleave(GROUPS, 1),
    "flatten": lambda x: x.unsqueeze(-3).expand(-1, -1, GROUPS, -1, -1).flatten(1, 2),
    "contiguous": lambda x: x[:, :, None].expand(-1, -1, GROUPS, -1, -1).contiguous().view(BATCH, HEADS, SLOTS, DIM),
}


@pytest.mark.parametrize("queries", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("repeat", REPEATS)
def test_repeated_heads(repeat: str, queries: int) -> None:
    """The op reads the cache as it is, and no copy of it is left."""
    function = REPEATS[repeat]
    result = fused(lambda q, k, v: F.scaled_dot_product_attention(q, function(k), function(v)), *given(queries))
    assert result.variants == ["decode_attention:all"]
    assert [arguments(result)[name].op for name in "qkv"] == ["placeholder"] * 3
    assert result.targets == ["aiter_fusion.decode_attention.default"]
    assert arguments(result)["scale"] == DIM**-0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_heads_that_are_not_copied(dtype: torch.dtype) -> None:
    """By ``enable_gqa``, of one head by a view, and where every query has a key of its own; any scale."""
    q, k, v = given(2, dtype)
    fused(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3), q, k, v)
    one = fused(
        lambda q, k, v: F.scaled_dot_product_attention(q, *(x[:, :1].expand(-1, HEADS, -1, -1) for x in (k, v))),
        q,
        k,
        v,
    )
    assert arguments(one)["k"].meta["val"].shape == (BATCH, 1, SLOTS, DIM)
    own = fused(F.scaled_dot_product_attention, *(x.repeat(1, HEADS // x.shape[1], 1, 1) for x in (q, k, v)))
    assert own.variants == ["decode_attention:all"]


@pytest.mark.parametrize("of", [0, 1])
def test_heads_in_another_order(of: int) -> None:
    """``repeat`` puts the heads of a group far from each other; half of the caches repeated is no group at all. The op
    takes the copies."""
    wrong = (lambda x: x.repeat(1, GROUPS, 1, 1), lambda x: x[:, None].expand(-1, GROUPS, -1, -1, -1).flatten(1, 2))[of]
    result = fused(lambda q, k, v: F.scaled_dot_product_attention(q, wrong(k), repeat_kv(v)), *given())
    assert arguments(result)["k"].meta["val"].shape == (BATCH, HEADS, SLOTS, DIM)


def test_many_queries() -> None:
    """Where nothing is copied for them, that is no step of decoding, and no site; else the copies go."""
    q, k, v = given(FEW + 1)
    result = checked(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    with torch.no_grad():
        result.call(q, k, v)
    assert result.report.sites == ()
    result = fused(lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v)), q, k, v)
    assert result.variants == ["decode_attention:all"]


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float = 0.0) -> Tensor:
    """As transformers has it without PyTorch's call."""
    scores = q @ repeat_kv(k).transpose(2, 3) * 0.2
    scores = torch.tanh(scores / cap) * cap if cap else scores
    scores = scores if mask is None else scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ repeat_kv(v)).transpose(1, 2).contiguous()


def by_division(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(2, 3) / math.sqrt(DIM)
    scores = scores if mask is None else mask + scores
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def by_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


DECOMPOSED: dict[str, tuple[Callable[..., Tensor], bool, float, float]] = {
    "eager": (by_hand, False, 0.2, 0.0),
    "softcap": (lambda *inputs: by_hand(*inputs, cap=30.0), False, 0.2, 30.0),
    "division": (by_division, True, 0.125, 0.0),
    "math": (by_math, False, 0.125, 0.0),
}


@pytest.mark.parametrize(
    ("queries", "dtype"),
    [
        (1, torch.bfloat16),
        (3, torch.float32),
        pytest.param(3, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(1, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("name", "masked"),
    [*((name, True) for name in DECOMPOSED), ("math", False)],  # Inductor has another softmax(a * b)
)
def test_decomposed(name: str, masked: bool, queries: int, dtype: torch.dtype) -> None:
    """Within the tolerance of sums of products: the graph rounds the scores, and the op does not."""
    function, alike, scale, cap = DECOMPOSED[name]
    q, k, v = given(queries, dtype)
    k, v = (repeat_kv(k), repeat_kv(v)) if alike else (k, v)
    mask = torch.randn(BATCH, 1, queries, SLOTS).to(dtype) if masked else None
    result = checked(function, verify=True)
    with torch.no_grad():
        have = result.call(q, k, v, mask)
        want = function(q, k, v, mask)
    assert result.variants == ["decode_attention:" + ("+".join(["mask"] * masked + ["softcap"] * (cap > 0)) or "all")]
    found = arguments(result)
    assert (found["scale"], found["softcap"]) == (pytest.approx(scale), cap)
    assert found["k"].op == found["v"].op == "placeholder"
    assert difference(ATTENTION, PROVIDERS["reference"], "y", want, have, exact=False) is None


# ---- the operators of other backends: put into a graph in the place of the CPU's ------------------------------


def other_backend(
    operator: str, *between: Any, fill: float = -math.inf, **options: Any
) -> tuple[fx.Graph, FusionReport]:
    """The graph of a step, with another operator for the attention, and what becomes of it."""
    (captured,) = causal_step().oracle.graphs
    graph = copy_graph(captured.before.graph)
    (call,) = [node for node in graph.nodes if "flash_attention_for_cpu" in str(node.target)]
    q, k, v = cast(list[fx.Node], call.args)[:3]
    mask = call.kwargs["attn_mask"]
    (result,) = call.users
    for node in graph.nodes:
        if node.target is aten.full.default and node.args[1] == -math.inf:
            node.args = (node.args[0], fill)
    with graph.inserting_before(call):
        target = getattr(aten, operator).default
        names = [argument.name for argument in target._schema.arguments]
        masked = {name: mask for name in ("attn_bias", "attn_mask") if name in names}
        other = graph.call_function(target, (q, k, v), {**masked, "scale": 0.125, **options})
    result.replace_input_with(call, other)
    graph.erase_node(call)
    for position in between:
        with graph.inserting_before(graph.output_node()):
            extra = graph.call_function(result.target, (other, position))
            extra.meta["val"] = torch.zeros(1)
        (returned,) = cast(tuple[list[fx.Node]], graph.output_node().args)
        graph.output_node().args = ((*returned, extra),)
    graph.eliminate_dead_code()
    report = PassManager(config.options()).run(graph, True)
    graph.lint()
    return graph, report


def causal_step(**options: Any) -> Checked:
    def step(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        seen = torch.arange(SLOTS)[None] <= torch.arange(1)[:, None] + position
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), seen[None, None], scale=0.125)

    return fused(step, *given(), torch.tensor(7), **options)


OPERATORS: dict[str, dict[str, Any]] = {
    "_scaled_dot_product_efficient_attention": {"compute_log_sumexp": False},
    "_scaled_dot_product_cudnn_attention": {"compute_log_sumexp": False},
    "_scaled_dot_product_fused_attention_overrideable": {},
    "_scaled_dot_product_flash_attention": {},
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_other_operators(operator: str) -> None:
    """Each by its schema; one takes no mask."""
    graph, report = other_backend(operator, **OPERATORS[operator])
    masked = operator != "_scaled_dot_product_flash_attention"
    assert [site.variant for site in report.sites] == ["position" if masked else "all"]
    (found,) = attention_nodes(graph)
    assert (found["mask"], found["scale"]) == (None, 0.125)
    targets = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert targets == {"aiter_fusion.decode_attention.default"}


@pytest.mark.parametrize("fill", [-65504.0, -65536.0, -1e9])
def test_false_for_cudnn(fill: float) -> None:
    """PyTorch says False as -65504 to cuDNN, and to it alone; other numbers are numbers."""
    options = {"compute_log_sumexp": False, "fill": fill}
    _, cudnn = other_backend("_scaled_dot_product_cudnn_attention", **options)
    _, efficient = other_backend("_scaled_dot_product_efficient_attention", **options)
    proved = "mask" if fill == -1e9 else "position"
    assert [site.variant for report in (cudnn, efficient) for site in report.sites] == [proved, "mask"]


def test_what_is_refused() -> None:
    """Weights that are dropped out, and results that nobody else computes."""
    operator = "_scaled_dot_product_efficient_attention"
    _, dropout = other_backend(operator, compute_log_sumexp=False, dropout_p=0.1)
    _, more = other_backend(operator, 1, compute_log_sumexp=True)
    _, debugged = other_backend("_scaled_dot_product_flash_attention", 8, return_debug_mask=True)
    for report, reason in (
        (dropout, "attention: its weights are dropped out (p = 0.1)"),
        (more, "attention: getitem_1 reads what else"),
        (debugged, "attention: getitem_1 reads what else"),
    ):
        (site,) = report.sites
        assert site.status == SKIPPED
        assert site.reason.startswith(reason)


def test_what_is_listed() -> None:
    """A causal call without a mask says nothing of where the cache ends; without copies there is nothing to gain."""

    def causal_calls(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        call = partial(F.scaled_dot_product_attention, q, is_causal=True)
        return [call(repeat_kv(k), repeat_kv(v)), call(k, v, enable_gqa=True)]

    result = checked(causal_calls)
    with torch.no_grad():
        result.call(*given(3))
    (site,) = result.report.sites
    assert (site.family, site.status) == ("causal_attention", BARE)
    assert site.reason.startswith("attention: by is_causal the first query sees the first key alone")


# ---- the masks ----------------------------------------------------------------------------------------------

Mask = Callable[[int, Tensor, Tensor], Tensor]


class Found(NamedTuple):
    """The variant of a site, and the arguments of its op."""

    variant: str
    node: dict[str, Any]


def slots(shift: int = 0) -> Tensor:
    return torch.arange(SLOTS)[None] + shift


def own(queries: int, position: Tensor) -> Tensor:
    return torch.arange(queries)[:, None] + position


def causal(queries: int, position: Tensor) -> Tensor:
    return (slots() <= own(queries, position))[None, None]


def windowed(queries: int, position: Tensor, window: int) -> Tensor:
    return causal(queries, position) & (slots() > own(queries, position) - window)


def additive(seen: Tensor, fill: float = -math.inf, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.where(seen, 0.0, fill).to(dtype)


def full(value: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full((), value, dtype=dtype)


def bias() -> Tensor:
    """Of distances, for each head."""
    return (torch.arange(HEADS)[:, None, None] * torch.arange(SLOTS)[None, None]).bfloat16()[None] / 64


LEAST = torch.finfo(torch.bfloat16).min

# Those of which a position is proved: alone, with a window, with another condition.
ALONE: dict[str, Mask] = {
    "less or equal": lambda t, p, pad: causal(t, p),
    "less": lambda t, p, pad: (slots() < own(t, p) + 1)[None, None],
    "greater or equal": lambda t, p, pad: (own(t, p) >= slots())[None, None],
    "greater": lambda t, p, pad: (own(t, p) + 1 > slots())[None, None],
    "not greater": lambda t, p, pad: ~(slots() > own(t, p))[None, None],
    "difference": lambda t, p, pad: (slots() - p <= torch.arange(t)[:, None])[None, None],
    "with 0": lambda t, p, pad: (slots() - own(t, p) <= 0)[None, None],
    "in 32 bits": lambda t, p, pad: (slots().int() <= own(t, p).int())[None, None],
    "shifted twice": lambda t, p, pad: (slots(3) - 3 <= own(t, p))[None, None],
    "of the batch": lambda t, p, pad: causal(t, p).expand(BATCH, 1, t, SLOTS),
    "of four dimensions": lambda t, p, pad: slots().view(1, 1, 1, -1) <= own(t, p).view(1, 1, -1, 1),
    "and True": lambda t, p, pad: causal(t, p) & torch.ones((), dtype=torch.bool),
    "and no limit": lambda t, p, pad: causal(t, p) & (slots() < SLOTS) & (torch.arange(t)[:, None] >= 0),
    "twice": lambda t, p, pad: causal(t, p) & (slots() < own(t, p) + 9),
    "added": lambda t, p, pad: additive(causal(t, p)),
    "filled": lambda t, p, pad: torch.zeros(1, 1, t, SLOTS, dtype=torch.bfloat16).masked_fill(~causal(t, p), -math.inf),
    "filled where later": lambda t, p, pad: torch.where((slots() > own(t, p))[None, None], full(-math.inf), full(0)),
    "the least number": lambda t, p, pad: torch.where(causal(t, p), full(0), full(LEAST)),
    "expanded after": lambda t, p, pad: additive(causal(t, p)).expand(BATCH, HEADS, t, SLOTS),
    "padded and cut": lambda t, p, pad: F.pad(torch.where(causal(t, p), full(0), full(-math.inf)), (0, 8))[..., :SLOTS],
}
WINDOWED: dict[str, Mask] = {
    "window": lambda t, p, pad: windowed(t, p, 6),
    "two windows": lambda t, p, pad: windowed(t, p, 6) & (slots() > own(t, p) - 9),
    "window before": lambda t, p, pad: (own(t, p) - slots() < 6) & causal(t, p),
    "window of the least number": lambda t, p, pad: torch.where(windowed(t, p, 6), full(0), full(LEAST)),
}
WITH_MORE: dict[str, Mask] = {
    "padding": lambda t, p, pad: causal(t, p) & pad[:, None, None],
    "padding, added": lambda t, p, pad: additive(pad[:, None, None] & causal(t, p)),
    "a bias": lambda t, p, pad: torch.where(causal(t, p), bias(), full(-math.inf)),
    "a bias, expanded": lambda t, p, pad: torch.where(causal(t, p), bias().expand(1, -1, t, -1), full(-math.inf)),
}
# Those of which nothing is proved.
UNPROVED: dict[str, Mask] = {
    "padding alone": lambda t, p, pad: pad[:, None, None].expand(BATCH, 1, t, SLOTS),
    "a window alone": lambda t, p, pad: (slots() > own(t, p) - 6)[None, None],
    "a limit": lambda t, p, pad: causal(t, p) & (slots() > 2),
    "two conditions": lambda t, p, pad: causal(t, p) & pad[:, None, None] & (slots() != 5),
    "a bias and padding": lambda t, p, pad: additive(causal(t, p) & pad[:, None, None]) + 1,
    "or": lambda t, p, pad: causal(t, p) | pad[:, None, None],
    "one later": lambda t, p, pad: (slots() <= own(t, p) + 1)[None, None],
    "one earlier": lambda t, p, pad: (slots() < own(t, p))[None, None],
    "twice the position": lambda t, p, pad: (slots() <= own(t, p) + p)[None, None],
    "every other slot": lambda t, p, pad: (torch.arange(0, 2 * SLOTS, 2)[None] <= own(t, p))[None, None],
    "backwards": lambda t, p, pad: (torch.arange(SLOTS - 1, -1, -1)[None] <= own(t, p))[None, None],
    "equal": lambda t, p, pad: (slots() == own(t, p))[None, None],
    "a small number": lambda t, p, pad: torch.where(causal(t, p), full(0), full(-1e4)),
    "the least number and padding": lambda t, p, pad: torch.where(
        causal(t, p) & pad[:, None, None], full(0), full(LEAST)
    ),
    "exchanged": lambda t, p, pad: torch.where(causal(t, p), full(LEAST), full(0)),
    "of each sequence": lambda t, p, pad: slots() <= (torch.arange(BATCH)[:, None, None, None] + own(t, p)),
    "in 8 bits": lambda t, p, pad: (slots().to(torch.int8) <= own(t, p).to(torch.int8))[None, None],
    "of floats": lambda t, p, pad: (slots().float() <= own(t, p).float())[None, None],
    "a constant": lambda t, p, pad: (slots() <= own(t, torch.tensor(3)))[None, None].expand(BATCH, 1, t, SLOTS),
}


def by_mask(masks: Mapping[str, Mask], queries: int, position: Tensor) -> tuple[dict[str, Found], list[str]]:
    """What becomes of a step for each mask, all in one graph, and the calls that are left in it.

    The graph is called with a cache of one entry, of some and with a full one. The scales differ, so that no two steps
    are equal.
    """

    def steps(q: Tensor, k: Tensor, v: Tensor, position: Tensor, padding: Tensor) -> list[Tensor]:
        made = [mask(queries, position, padding) for mask in masks.values()]
        k, v = repeat_kv(k), repeat_kv(v)
        return [F.scaled_dot_product_attention(q, k, v, m, scale=0.1 + 0.01 * i) for i, m in enumerate(made)]

    padding = torch.ones(BATCH, SLOTS, dtype=torch.bool)
    padding[0, :3] = False
    result = checked(steps, verify=True, dynamic=False)
    with torch.no_grad():
        for filled in (0, 7, SLOTS - queries):
            result.call(*given(queries), torch.full_like(position, filled), padding)
    assert result.oracle.identical
    (graph,) = result.oracle.graphs
    assert {site.status for site in graph.report.sites} == {REPLACED}
    found = sorted(attention_nodes(graph.after.graph), key=lambda node: node["scale"])  # each follows its last input
    assert len(found) == len(masks)
    variants = [site.variant for site in graph.report.sites]
    return dict(zip(masks, map(Found, variants, found), strict=True)), result.targets


def left(targets: Sequence[str]) -> set[str]:
    return {target for target in targets if not target.startswith("aiter_fusion")}


@pytest.mark.parametrize("queries", [1, 3])
def test_a_position_is_proved(queries: int) -> None:
    """Nothing of the masks is left."""
    found, targets = by_mask(ALONE, queries, torch.tensor(0))
    for name, (variant, node) in found.items():
        assert variant == "position", name
        assert (node["mask"], node["window"], node["position"].op) == (None, 0, "placeholder"), name
    assert left(targets) == set()


@pytest.mark.parametrize("queries", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_window_is_proved(queries: int) -> None:
    found, targets = by_mask(WINDOWED, queries, torch.tensor(0))
    for name, (variant, node) in found.items():
        assert (variant, node["window"]) == ("position+window", 6), name
    assert left(targets) == set()


@pytest.mark.parametrize("queries", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_position_and_a_mask(queries: int) -> None:
    """The position bounds what is read; what is not understood stays a mask, boolean where the model's was."""
    found, targets = by_mask(WITH_MORE, queries, torch.tensor(0))
    for name, (variant, node) in found.items():
        assert variant == "mask+position", name
        assert (node["mask"].meta["val"].dtype is torch.bool) == ("bias" not in name), name
    assert not any("where" in target or "le." in target for target in targets)


@pytest.mark.parametrize("queries", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_nothing_is_proved(queries: int) -> None:
    found, _ = by_mask(UNPROVED, queries, torch.tensor(0))
    for name, (variant, node) in found.items():
        assert (variant, node["position"], node["window"]) == ("mask", None, 0), name


@pytest.mark.parametrize(
    "position", [torch.tensor(0, dtype=torch.int32), torch.tensor([0]), torch.tensor([[0]])], ids=str
)
def test_positions_of_one_integer(position: Tensor) -> None:
    found, _ = by_mask({"one": ALONE["less or equal"]}, 1, position)
    assert found["one"].variant == "position"
    assert found["one"].node["position"].meta["val"].dtype is position.dtype


def test_all_keys() -> None:
    """A sliding cache that is full, whose positions are numbers here: every slot counts."""

    def full_window(t: int, p: Tensor, pad: Tensor) -> Tensor:
        query = torch.arange(t)[:, None] + SLOTS + 1
        return ((slots(2) <= query) & (slots(2) > query - SLOTS))[None, None].expand(BATCH, 1, t, SLOTS)

    found, targets = by_mask({"full": full_window}, 1, torch.tensor(0))
    variant, node = found["full"]
    assert (variant, node["mask"], node["position"]) == ("all", None, None)
    assert left(targets) == set()


def test_symbolic_numbers() -> None:
    """The same, where the number has changed from step to step and is symbolic: one graph for all of them."""

    def step(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        keys = torch.arange(SLOTS) + (length - SLOTS + 1)
        query = torch.arange(1)[:, None] + length
        seen = (keys <= query) & (keys > query - SLOTS)
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), seen[None, None])

    result = checked(step)
    with torch.no_grad():
        for length in (30, 31, 32, 40):
            result.call(*given(), length)
    assert result.oracle.identical
    assert len(result.reports) == 2
    assert result.variants == ["decode_attention:all"] * 2


def test_masks_of_other_shapes() -> None:
    """The op's have four dimensions, the last as long as the cache: what is proved needs none of that."""
    proved = fused(
        lambda q, k, v, p: F.scaled_dot_product_attention(q, k, v, slots() <= own(1, p), enable_gqa=True),
        *given(),
        torch.tensor(4),
    )
    assert proved.variants == ["decode_attention:position"]
    for mask in (torch.zeros(1, SLOTS), torch.zeros(1, 1, 1, 1)):
        result = checked(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, enable_gqa=True))
        with torch.no_grad():
            result.call(*given(), mask.bfloat16())
        (site,) = result.report.sites
        assert site.status == SKIPPED
        assert site.reason == f"attention: its mask has shape {list(mask.shape)}, of attention [2, 8, 1, 24]"


def test_unread_slots_may_hold_anything() -> None:
    """NaN there stays there, where the graph would have multiplied it with 0."""
    result = causal_step()
    q, k, v = given()
    with torch.no_grad():
        want = result.call(q, k, v, torch.tensor(9))
        for cache in (k, v):
            cache[:, :, 10:] = math.nan
        have = result.call(q, k, v, torch.tensor(9))
    assert torch.equal(want, have)
    assert not have.isnan().any()


def test_verify_draws_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the cache, so that a kernel that reads another part of it does not pass."""

    def run(op: FusedOp) -> Callable[..., dict[str, Tensor]]:
        return lambda **given: op.reference(**{**given, "position": torch.zeros_like(given["position"])})

    monkeypatch.setitem(PROVIDERS, "reference", replace(PROVIDERS["reference"], run=run))
    with pytest.raises(Exception, match=r"decode_attention position at the top level.*not bit-identical"):
        causal_step(verify=True)
