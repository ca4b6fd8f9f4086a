"""All-reduces: the sum of a tensor over the ranks of a process group, waited for; or the sum of two of them.

Functional collectives, in-place ones, DTensor and tensor-parallel plans all come down to ``all_reduce`` and
``wait_tensor``.
"""

from __future__ import annotations

import torch
from torch import fx

from ..reasons import Reason, Refusal
from .form import Completion, Form
from .fx_facts import FLOATS, VIEWS, dtype, prims, readers, same_size, shape
from .language import Call, Found, Pattern, Var, Views, add, anything

# Builds of PyTorch without torch.distributed have neither.
WAIT, ALL_REDUCE = (
    (torch.ops._c10d_functional.wait_tensor.default, torch.ops._c10d_functional.all_reduce.default)
    if torch.distributed.is_available()
    else (None, None)
)


def _reduced(name: str, reduction: str) -> Call:
    """The all-reduce of ``name``, waited for."""
    return Call((WAIT,), (Call((ALL_REDUCE,), (Var(name), anything(reduction), anything("group"))),))  # type: ignore[arg-type]


def is_reduced(node: fx.Node) -> bool:
    """Whether a value is an all-reduced one, maybe viewed or converted."""
    while node.target in VIEWS or node.target is prims.convert_element_type.default:
        node = node.args[0]  # type: ignore[assignment]
    return node.target is WAIT and node.args[0].target is ALL_REDUCE  # type: ignore[union-attr]


def _complete(root: fx.Node, found: Found) -> Completion | str:
    for node in found.nodes:  # an all-reduce that something else reads is not taken away by being computed again
        if node is not root and any(reader not in (*found.nodes, root) for reader in readers(node)):
            return f"{node.name} is read elsewhere too"
    for x in found.inputs.values():
        if dtype(x) not in FLOATS or dtype(x) is not dtype(root):
            return f"{x.name}, which is reduced, is {dtype(x)}, and the result {dtype(root)}"
        if not (shape(x) and same_size(shape(x)[-1], shape(root)[-1])):
            return f"{x.name}, which is reduced, has other rows than the result"
    group = found.attributes["group"]
    reductions = {str(found.attributes.get(name, "sum")) for name in ("reduction", "other_reduction")}
    refusal = None
    if reductions != {"sum"}:
        refusal = Refusal(Reason.COLLECTIVE, f"the reduction is {', '.join(sorted(reductions - {'sum'}))}, not sum")
    elif not isinstance(group, str):
        refusal = Refusal(Reason.COLLECTIVE, f"the group is given by {type(group).__name__}, not by its name")
    features = frozenset({"pair"}) if "other" in found.inputs else frozenset()
    return Completion({"group": group}, features, refusal=refusal)


def _form(name: str, pattern: Pattern) -> Form:
    alone = Refusal(Reason.UNNORMALISED, "no RMSNorm of this graph reads the reduced value")
    return Form("all_reduce", name, pattern, output="reduced", complete=_complete, alone=alone)


FORMS: tuple[Form, ...] = (
    # DeepSeek's experts: the routed and the shared ones are reduced each for itself
    _form("sum_of_two", add(Views(_reduced("x", "reduction")), Views(_reduced("other", "other_reduction")))),
    _form("all_reduce", _reduced("x", "reduction")),
)
