"""A decoder of a mixture of experts, written with AITER's operators, and compiled as one graph.

    python examples/aiter_ops.py

Norms, rotary embedding, the cache and attention over it, routing, experts and the choice of the next token are
functions of ``aiter_fusion.bridge``. On a CPU each is plain PyTorch, slow and exact; on an AMD GPU with AITER installed
the same script calls AITER's kernels: nothing is added, nothing is asked for. Every step of decoding runs the one graph
that ``torch.compile(..., fullgraph=True)`` made.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aiter_fusion import bridge

BLOCK, MOST = 16, 64  # tokens in a block of the cache, and the most of a sequence
EPS, LAYOUT = 1e-5, "nhd"


class Sizes(NamedTuple):
    """What a decoder is like."""

    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    experts: int = 8
    inner: int = 128
    topk: int = 2
    layers: int = 2
    vocabulary: int = 512


class Step(NamedTuple):
    """Where the sequences stand: of each its position, its slot and its blocks in the cache, and its length."""

    positions: Tensor
    slots: Tensor
    block_table: Tensor
    lengths: Tensor


class Layer(nn.Module):
    """Attention and a mixture of experts."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.attention_norm, self.experts_norm = (nn.Parameter(torch.ones(sizes.hidden)) for _ in range(2))
        self.qkv = nn.Linear(sizes.hidden, (sizes.heads + 2 * sizes.kv_heads) * sizes.head, bias=False)
        self.out = nn.Linear(sizes.heads * sizes.head, sizes.hidden, bias=False)
        self.router = nn.Linear(sizes.hidden, sizes.experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(sizes.experts, 2 * sizes.inner, sizes.hidden) * 0.05)
        self.w2 = nn.Parameter(torch.randn(sizes.experts, sizes.hidden, sizes.inner) * 0.05)

    def forward(self, x: Tensor, residual: Tensor, cache: tuple[Tensor, Tensor], rotary: Any, step: Step) -> Any:
        sizes = self.sizes
        x, residual = bridge.add_rms_norm(x, residual, self.attention_norm, EPS)
        heads = self.qkv(x).unflatten(-1, (-1, sizes.head))
        q, k, v = heads.split([sizes.heads, sizes.kv_heads, sizes.kv_heads], 1)
        q, k = bridge.rotary_embedding(q, k, rotary[0], rotary[1], step.positions)
        bridge.reshape_and_cache(k, v.contiguous(), *cache, step.slots, LAYOUT)
        attended = bridge.paged_attention(q, *cache, step.block_table, step.lengths, MOST, LAYOUT)
        x, residual = bridge.add_rms_norm(self.out(attended.flatten(1)), residual, self.experts_norm, EPS)
        weights, ids = bridge.topk_softmax(self.router(x), sizes.topk)
        return bridge.fused_moe(x, self.w1, self.w2, weights, ids), residual


class Decoder(nn.Module):
    """The next token of each sequence from its last one."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.Parameter(torch.ones(sizes.hidden))
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
        angles = torch.arange(MOST)[:, None] * 10000.0 ** (-torch.arange(0, sizes.head, 2) / sizes.head)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, caches: list[tuple[Tensor, Tensor]], step: Step) -> Tensor:
        x = self.embedding(tokens)
        residual = torch.zeros_like(x)
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, cache, (self.cos, self.sin), step)
        x, _ = bridge.add_rms_norm(x, residual, self.norm, EPS)
        return bridge.greedy_sample(self.head(x))


def build(device: str = "cpu", sizes: Sizes = Sizes()) -> Decoder:  # noqa: B008 (a tuple)
    torch.manual_seed(0)
    return Decoder(sizes).to(device, torch.bfloat16).eval()


def memory(model: Decoder, sequences: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """A cache for each layer, and which of its blocks belong to which sequence: in no particular order."""
    sizes, blocks = model.sizes, sequences * MOST // BLOCK
    shape = (blocks, BLOCK, sizes.kv_heads, sizes.head)
    caches = [tuple(model.norm.new_zeros(shape) for _ in "kv") for _ in range(sizes.layers)]
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(1))
    return caches, order.view(sequences, -1).to(model.norm.device, torch.int32)  # type: ignore[return-value]


def decode(step_of: Any, model: Decoder, prompt: Tensor, count: int) -> Tensor:
    """Feed the prompt ``[sequences, tokens]`` token by token, then ``count`` tokens of the model's own choice.

    Returns:
        All tokens, ``[sequences, tokens + count]``.
    """
    caches, table = memory(model, len(prompt))
    tokens = prompt
    for place in range(prompt.shape[1] + count - 1):
        positions = torch.full((len(prompt),), place, device=prompt.device)
        slots = table[:, place // BLOCK].long() * BLOCK + place % BLOCK
        step = Step(positions, slots, table, (positions + 1).int())
        chosen = step_of(tokens[:, place].contiguous(), caches, step)
        if place + 1 == tokens.shape[1]:
            tokens = torch.cat((tokens, chosen[:, None].long()), 1)
    return tokens


def main() -> None:
    """The argument is the compiler's backend, ``aiter_fusion`` unless given."""
    backend = sys.argv[1] if len(sys.argv) > 1 else "aiter_fusion"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(device)
    prompt = torch.tensor([[1, 2, 3], [7, 8, 9]], device=device)
    with torch.no_grad():
        want = decode(model, model, prompt, 4)
        torch._dynamo.utils.counters.clear()
        have = decode(torch.compile(model, backend=backend, fullgraph=True), model, prompt, 4)
    counted = torch._dynamo.utils.counters
    print(f"tokens: {have.tolist()}")
    print(f"compiled and not, the same: {torch.equal(want, have)}")
    print(f"graphs: {counted['stats']['unique_graphs']}, graph breaks: {sum(counted['graph_break'].values())}")
    x = torch.zeros(2, model.sizes.hidden, device=device, dtype=torch.bfloat16)
    why = bridge.why_not("rms_norm", x=x, weight=model.norm, eps=EPS)
    print(f"computed by: {'AITER' if why is None else f'PyTorch ({why})'}")


if __name__ == "__main__":
    main()
