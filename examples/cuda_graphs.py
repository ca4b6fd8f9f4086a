"""CUDA graphs and ``warmup``: everything is compiled, loaded and allocated before a graph is captured.

    python examples/cuda_graphs.py

On a CPU there is nothing to capture: the example then shows that ``warmup`` has compiled for every shape to come.
"""

from __future__ import annotations

import torch
from tiny import DEVICE, batch, build

import aiter_fusion

ROWS = (4, 1)  # the shapes that a server is to take


@torch.no_grad()
def main() -> None:
    model = build()
    compiled = torch.compile(model, backend="aiter_fusion", dynamic=False)
    report = aiter_fusion.warmup(compiled, [(batch(rows),) for rows in ROWS])
    print(report)
    known = len(aiter_fusion.reports())

    graphs = {}
    for rows in ROWS:
        x = batch(rows)
        if DEVICE == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = compiled(x)
            graphs[rows] = graph, x, y
            x.copy_(2 * batch(rows))
            graph.replay()
            torch.testing.assert_close(y, compiled(2 * batch(rows)))
        else:
            compiled(x)
    print(f"captured {len(graphs)} CUDA graphs; compiled since warmup: {len(aiter_fusion.reports()) - known}")
    # Inductor captures and replays by itself with mode="reduce-overhead"; warmup makes its three first calls.


if __name__ == "__main__":
    main()
