"""Nothing about shapes is baked in: one compiled graph serves any number of tokens, and the passes add no guard."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from aiter_fusion import config
from aiter_fusion.passes.manager import PassManager
from support import cases
from support.checked import checked

ADD = cases.FUSION["add_norm"].call(cases.llama, cases.q1_row)


def site(x: Tensor, r: Tensor, w: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
    return (*ADD(x, r, w), *cases.q7(128)(cases.sliced(x2)))


def inputs(rows: int) -> list[Tensor]:
    made = cases.tensors(("x", "r", "w", "x2"), (rows,), torch.bfloat16, "normal")
    for position in (0, 1, 3):
        torch._dynamo.mark_dynamic(made[position], 0)
    return made


def test_one_compile_serves_1_to_4096_rows() -> None:
    """1 row is always a graph of its own in PyTorch (0 and 1 are specialised); all others share one."""
    result = checked(site)
    counter = CompileCounterWithBackend(result.oracle)  # type: ignore[arg-type]
    call = torch.compile(site, backend=counter)
    with torch.no_grad():
        for rows in (2, 3, 7, 16, 64, 129, 1000, 4096):
            call(*inputs(rows))
        assert counter.frame_count == 1
        call(*cases.tensors(("x", "r", "w", "x2"), (1,), torch.bfloat16, "normal"))
    assert counter.frame_count == 2
    assert result.oracle.identical
    assert all(r.replaced == {"rms_norm_quant": 1, "act_mul_quant": 1} for r in result.reports)


@pytest.mark.parametrize("verify", [False, True])
def test_the_passes_add_no_guard(verify: bool) -> None:
    """Before the pass there are those of a graph that it has not seen: the oracle of level 0 does not run it."""
    result = checked(site, level=0)
    with torch.no_grad():
        result.call(*inputs(16))
    before = result.oracle.graphs[0].before
    rows = next(n.meta["val"] for n in before.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt))
    environment = rows.node.shape_env
    known = [str(guard.expr) for guard in environment.guards]
    replaced = PassManager(config.options(verify=verify)).run(before.graph, True).replaced
    assert replaced == {"rms_norm_quant": 1, "act_mul_quant": 1}
    assert [str(guard.expr) for guard in environment.guards] == known
