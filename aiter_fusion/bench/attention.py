"""``bench attention``: one token of every sequence over a filled cache, against what compiled models do.

Ours is the op as a compiled graph runs it. Theirs is Inductor's code for the form of Hugging Face's models, which
repeats keys and values for every head of queries and makes a mask from the position, and the same call without the
copies (``enable_gqa``). All are timed in CUDA graphs of many calls, in turn, with caches that rotate over more memory
than the L2 cache holds.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch.nn import functional

from ..ops.attention import ATTENTION
from ..providers import PROVIDERS
from ..tables import plain, table
from .ops import copy_rate
from .timing import Conditions, Refused, alternate, capture, check_folder, conditions, need_gpu, progress

BATCHES, CONTEXTS, GROUPS = (1, 8, 32, 128), (512, 1024, 4096, 16384, 32768), (1, 4, 8)
HEADS, SIZE = 32, 128
# Caches of one call that are larger than this are left out.
MOST_BYTES = 8 << 30
# What the caches must exceed, in sizes of the L2 cache; a graph has at least so many calls, and is replayed this often.
CACHES, GRAPH_CALLS, ROUNDS = 4, 8, 15
# Sequences that errors are computed for.
CHECKED = 4
# Our error to float64 over that of the attention that is replaced, at most.
WORSE = 1.02


@dataclass(frozen=True)
class Case:
    """Attention of ``tokens`` queries of every sequence over a cache of ``context`` keys, of which ``filled`` are.

    group: heads of queries that share one of keys; size: elements of a head.
    filled: with the queries' own keys; 0: all.
    mask:   besides the position: none, bool, added, or rows (added, another for every head and token).
    """

    batch: int
    context: int
    group: int = 4
    heads: int = HEADS
    size: int = SIZE
    tokens: int = 1
    dtype: torch.dtype = torch.bfloat16
    filled: int = 0
    mask: str = "none"
    window: int = 0
    softcap: float = 0.0

    def __str__(self) -> str:
        more = {"tokens": self.tokens, "filled": self.filled, "mask": self.mask, "window": self.window}
        usual = {"tokens": 1, "filled": 0, "mask": "none", "window": 0}
        said = "".join(f" {name} {value}" for name, value in more.items() if value != usual[name])
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.batch}x{self.context} heads {self.heads}/{self.heads // self.group}x{self.size} {kind}{said}"

    @property
    def bytes(self) -> int:
        """Of keys and values that a call reads."""
        seen = self.filled or self.context
        seen = min(seen, self.window + self.tokens - 1) if self.window else seen
        return 2 * self.batch * self.heads // self.group * seen * self.size * self.dtype.itemsize

    def sets(self, cache: int) -> int:
        """How many caches the calls rotate over, for an L2 cache of that many bytes."""
        return max(2, math.ceil(CACHES * cache / self.bytes))

    def arguments(self, device: str, seed: int = 0) -> dict[str, Any]:
        """The op's arguments by name, in order, of random values."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, dtype=self.dtype, device=device, generator=generator)

        cache = (self.batch, self.heads // self.group, self.context, self.size)
        return {
            "q": draw(self.batch, self.tokens, self.heads, self.size).transpose(1, 2),
            "k": draw(*cache),
            "v": draw(*cache),
            "mask": self._mask(device, draw),
            "position": torch.full((), (self.filled or self.context) - self.tokens, device=device),
            "scale": self.size**-0.5,
            "window": self.window,
            "softcap": self.softcap,
            "by_tokens": True,
        }

    def _mask(self, device: str, draw: Callable[..., Tensor]) -> Tensor | None:
        """Of padding: sequences begin at different keys."""
        if self.mask == "none":
            return None
        begins = torch.arange(self.batch, device=device) * 7 % max(1, (self.filled or self.context) // 2)
        seen = (torch.arange(self.context, device=device) >= begins[:, None])[:, None, None, :]
        if self.mask == "bool":
            return seen
        sizes = (self.batch, self.heads, self.tokens, self.context) if self.mask == "rows" else tuple(seen.shape)
        return draw(*sizes).masked_fill(~seen, -math.inf)


@dataclass(frozen=True)
class Row:
    """Times of one case in microseconds; errors to float64, relative, in the 2-norm.

    inductor_us: of Inductor's code for Hugging Face's form.
    floor_us:    of reading keys and values once, at the rate of a copy.
    """

    case: str
    ours_us: float
    inductor_us: float
    gqa_us: float
    floor_us: float
    ours_error: float
    inductor_error: float

    @property
    def ratio(self) -> float:
        """Our time over that of Inductor's code."""
        return self.ours_us / self.inductor_us


@dataclass(frozen=True)
class Result:
    """What ``bench attention`` measured; ``copy_rate`` in bytes a second; ``seconds``: that it took."""

    conditions: Conditions
    copy_rate: float
    rows: tuple[Row, ...]
    refused: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        headers = ["batch x context", "ours us", "Inductor us", "enable_gqa us", "floor us", "ours / Inductor"]
        headers += ["ours / enable_gqa", "ours / floor", "error ours", "error Inductor"]
        lines = [
            [
                row.case,
                *(f"{us:.2f}" for us in (row.ours_us, row.inductor_us, row.gqa_us, row.floor_us)),
                *(f"{row.ours_us / us:.3f}" for us in (row.inductor_us, row.gqa_us, row.floor_us)),
                f"{row.ours_error:.2e}",
                f"{row.inductor_error:.2e}",
            ]
            for row in self.rows
        ]
        mean = statistics.geometric_mean(row.ratio for row in self.rows) if self.rows else math.nan
        return "\n".join(
            [
                str(self.conditions),
                f"copy rate {self.copy_rate * 1e-12:.2f} TB/s (read and written); measured in {self.seconds:.0f} s",
                "",
                plain(table(headers, lines, left=("batch x context",))),
                "",
                f"ours / Inductor, geometric mean: {mean:.3f}",
            ]
        )

    def to_json(self) -> str:
        """A JSON object with the fields of this class."""
        return json.dumps(asdict(self), indent=1)


def cases(batches: Iterable[int], contexts: Iterable[int], groups: Iterable[int]) -> list[Case]:
    """All cases of these sizes whose caches are not too large.

    Raises:
        ValueError: a group does not divide the heads.
    """
    groups = list(groups)
    for group in groups:
        if HEADS % group:
            raise ValueError(f"--groups {group}: does not divide the {HEADS} heads of queries")
    every = [Case(batch, context, group) for group in groups for batch in batches for context in contexts]
    return [case for case in every if case.bytes <= MOST_BYTES]


def bench(chosen: Sequence[Case], *, command: str) -> Result:
    """Measure the cases on the current GPU.

    Args:
        command: what to note as the source of the result.

    Raises:
        RuntimeError: there is no GPU, or our kernels cannot run on it.
    """
    need_gpu()
    if missing := PROVIDERS["triton"].missing():
        raise RuntimeError(f"our kernels cannot run here: {missing}")
    PROVIDERS["triton"].prepare()
    started, rows, refused = time.perf_counter(), [], []
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        rate = copy_rate()
        for case in progress(chosen, "bench attention"):
            try:
                rows.append(_measure(case, rate))
            except Refused as problem:
                refused.append(f"{case}: {problem}")
    return Result(conditions(command), rate, tuple(rows), tuple(refused), time.perf_counter() - started)


def functions(arguments: dict[str, Any]) -> dict[str, Callable[..., Tensor]]:
    """Our op, Hugging Face's form and that without copies, of the tensors of such arguments (``tensors_of``).

    Each returns ``[B, T, H, D]``, contiguous, which is what a model's next layer reads.
    """
    batch, heads, tokens, size = arguments["q"].shape
    key_heads, keys = arguments["k"].shape[1:3]
    group, window, softcap = heads // key_heads, arguments["window"], arguments["softcap"]
    scale = arguments["scale"]

    def ours(q: Tensor, k: Tensor, v: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        return ATTENTION.target(q, k, v, mask, position, scale, window, softcap, True, "triton").transpose(1, 2)

    def seen(position: Tensor, mask: Tensor | None) -> Tensor:
        place = torch.arange(keys, device=position.device)
        at = (torch.arange(tokens, device=position.device) + position)[:, None]
        found = (place <= at) & (place > at - window) if window else place <= at
        found = found.expand(batch, 1, tokens, keys)
        if mask is None:
            return found
        return found & mask if mask.dtype is torch.bool else mask.masked_fill(~found, -math.inf)

    def repeated(x: Tensor) -> Tensor:
        return x[:, :, None].expand(batch, key_heads, group, keys, size).reshape(batch, heads, keys, size)

    def inductor(q: Tensor, k: Tensor, v: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        given = seen(position, mask)
        y = functional.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=given, scale=scale)
        return y.transpose(1, 2).contiguous()

    def gqa(q: Tensor, k: Tensor, v: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        given = seen(position, mask)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=given, scale=scale, enable_gqa=group > 1)
        return y.transpose(1, 2).contiguous()

    return {"ours_us": ours, "inductor_us": inductor, "gqa_us": gqa}


def tensors_of(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """What the functions take."""
    found = [arguments[name] for name in ("q", "k", "v", "position", "mask")]
    return tuple(tensor for tensor in found if tensor is not None)


def rotating(case: Case) -> list[dict[str, Any]]:
    """Arguments whose keys and values pass through more than the L2 cache."""
    count = case.sets(torch.cuda.get_device_properties().L2_cache_size)
    first = case.arguments("cuda")
    return [first, *({**first, "k": first["k"].clone(), "v": first["v"].clone()} for _ in range(count - 1))]


def _measure(case: Case, rate: float) -> Row:
    torch._dynamo.reset()
    sets = rotating(case)
    if reason := PROVIDERS["triton"].why_not(ATTENTION, sets[0]):
        raise Refused(reason)
    found = functions(sets[0])
    runs = {name: torch.compile(run, dynamic=False, fullgraph=True) for name, run in found.items()}
    given = [tensors_of(arguments) for arguments in sets]
    have, want = (error(sets[0], runs[name](*given[0])) for name in ("ours_us", "inductor_us"))
    if not have <= WORSE * want:
        raise Refused(f"our error to float64 is {have:.2e}, that of the attention that is replaced {want:.2e}")
    calls = len(sets) * math.ceil(GRAPH_CALLS / len(sets))
    graphs = [capture(run, given, calls) for run in runs.values()]
    times = alternate([graph.replay for graph in graphs], ROUNDS)
    measured = {name: microseconds / calls for name, microseconds in zip(runs, times, strict=True)}
    return Row(case=str(case), floor_us=case.bytes / rate * 1e6, ours_error=have, inductor_error=want, **measured)


def exact(arguments: dict[str, Any], sequences: int = CHECKED) -> Tensor:
    """The attention of the first sequences, in float64: ``[sequences, T, H, D]``."""
    q, k, v = (arguments[name][:sequences].double() for name in "qkv")
    batch, heads, tokens, size = q.shape
    key_heads, keys = k.shape[1:3]
    grouped = q.reshape(batch, key_heads, heads // key_heads, tokens, size)
    score = grouped @ k[:, :, None].mT * arguments["scale"]
    if softcap := arguments["softcap"]:
        score = softcap * torch.tanh(score / softcap)
    score = score.reshape(batch, heads, tokens, keys)
    visible = torch.ones(tokens, keys, dtype=torch.bool, device=q.device)
    if (position := arguments["position"]) is not None:
        place = torch.arange(keys, device=q.device)
        at = position + torch.arange(tokens, device=q.device)[:, None]
        visible = place <= at
        if window := arguments["window"]:
            visible &= place > at - window
        # what lies in slots that no query sees does not count
        v = v.masked_fill(~visible.any(0)[:, None], 0.0)
    if (mask := arguments["mask"]) is not None:
        mask = mask[:sequences] if mask.shape[0] > 1 else mask
        score = score.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else score + mask.double()
    weight = score.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)
    y = weight.reshape(batch, key_heads, heads // key_heads, tokens, keys) @ v[:, :, None]
    return y.reshape(batch, heads, tokens, size).transpose(1, 2)


def error(arguments: dict[str, Any], y: Tensor) -> float:
    """The relative error of the first sequences of a result ``[B, T, H, D]``, in the 2-norm."""
    want = exact(arguments)
    return float((y[: want.shape[0]].double() - want).norm() / want.norm())


def command(args: Any) -> None:
    """``bench attention``: measure, print, write what was asked for."""
    check_folder(args.json)
    result = bench(cases(args.batches, args.contexts, args.groups), command=args.command_line)
    print(result)
    if args.json:
        Path(args.json).write_text(result.to_json() + "\n")
    if result.refused:
        raise Refused(f"{len(result.refused)} cases were not compared: {result.refused[0]}")
