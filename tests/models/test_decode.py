"""Steps of decoding by transformers' own models and caches: one attention a layer, from the cache as it lies.

Each step is interpreted as captured and as rewritten; a compiled ``generate()`` gives eager's tokens; and the code that
Inductor generates holds no second cache, leaves the same bits in the first, and updates it in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import aiter_fusion
from aiter_fusion import config
from aiter_fusion.passes.manager import PassManager
from aiter_fusion.passes.oracle import copy_graph
from aiter_fusion.passes.verify import same_bits
from aiter_fusion.report import BARE, FusionReport
from support import models
from support.checked import checked

WINDOW, LENGTH = 8, 16
ATTENTION = re.compile("attention")
# One of each form of mask and of attention: the other steps have these, of another family or with another size.
EVERY_TIME = (
    "Llama-4 filled",
    "Llama-4 filled-padded",
    "Mistral-8-4 filled",
    "Gemma3-8-['sliding_attention', 'full_attention']-10 filled",
    "Gemma2-8-4 filled",
    "GptOss-8-4 filled",
)


@dataclass(frozen=True)
class Step:
    """A family, how much its cache holds before the step, and what becomes of the attention of each layer.

    exact: whether the op keeps the graph's bits; padded: whether the first sequence is shorter; tokens: of the step.
    """

    family: str
    sites: tuple[str, ...]
    filled: int = 4
    exact: bool = True
    padded: bool = False
    tokens: int = 1
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        details = ["padded"] * self.padded + [f"{self.tokens} tokens"] * (self.tokens > 1)
        return "-".join([self.family, *map(str, self.changes.values()), f"{self.filled} filled", *details])


SLIDING = {"sliding_window": WINDOW}
BOTH = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
POSITION, MASK, ALL = ("decode_attention:position",), ("decode_attention:mask",), ("decode_attention:all",)
STEPS = (
    Step("Llama", POSITION),
    Step("Llama", POSITION, filled=12, tokens=4),
    Step("Llama", POSITION, changes={"num_key_value_heads": 4}),
    Step("Llama", POSITION, changes={"num_key_value_heads": 1}),
    Step("Llama", ("decode_attention:mask+position",), padded=True),
    Step("Qwen3", POSITION),
    Step("Mistral", POSITION, changes={"sliding_window": None}),
    # the position in a window is a Python number: a mask, until the window is full
    Step("Mistral", MASK, changes=SLIDING),
    Step("Mistral", ALL, filled=10, changes=SLIDING),
    Step("Gemma3", MASK + POSITION, changes=BOTH),
    Step("Gemma3", ALL + POSITION, filled=10, changes=BOTH),
    Step("Phi3", POSITION),
    Step("Phi3", MASK, changes=SLIDING),
    # without PyTorch's call, for the sake of a bound or of sinks
    Step(
        "Gemma2", ("decode_attention:mask+softcap", "decode_attention:position+softcap"), exact=False, changes=SLIDING
    ),
    Step("GptOss", ("sink_attention:eager",) * 2, changes=SLIDING),
)


def attention_sites(report: FusionReport) -> list[str]:
    return [f"{site.family}:{site.variant}" for site in report.sites if ATTENTION.search(site.family)]


def prompted(step: Step, model: nn.Module) -> tuple[dict[str, Any], list[Tensor]]:
    """The cache after a prompt, with the mask of what is padding; and tokens that follow it."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)  # type: ignore[arg-type]
    fed = models.tokens(2, step.filled + 4 * step.tokens)
    given: dict[str, Any] = {"past_key_values": cache}
    if step.padded:
        given["attention_mask"] = torch.ones(2, step.filled, dtype=torch.long)
        given["attention_mask"][0, :2] = 0
    model(fed[:, : step.filled], **given)
    return given, list(fed[:, step.filled :].split(step.tokens, 1))


def stepped(step: Step, call: Callable[..., Any], given: dict[str, Any], fed: list[Tensor], count: int) -> list[Tensor]:
    logits = []
    for tokens in fed[:count]:
        if step.padded:
            more = torch.ones(2, step.tokens, dtype=torch.long)
            given["attention_mask"] = torch.cat([given["attention_mask"], more], 1)
        logits.append(call(tokens, **given).logits)
    return logits


@pytest.mark.parametrize(
    "step",
    [pytest.param(step, id=str(step), marks=() if str(step) in EVERY_TIME else pytest.mark.slow) for step in STEPS],
)
def test_counts(step: Step) -> None:
    """One site a layer, of models that are not quantised; bit for bit where PyTorch's call is in the graph."""
    model = models.build(step.family, num_hidden_layers=len(step.sites), **step.changes)
    result = checked(model, verify=True)
    with torch.no_grad():
        given, fed = prompted(step, model)
        stepped(step, result.call, given, fed, 1)
    (report,) = result.reports
    assert attention_sites(report) == list(step.sites)
    assert report.unaccounted == 0
    assert not report.skipped
    assert result.oracle.identical == step.exact
    if step.family == "GptOss":
        bare = [site for site in report.bare if site.family == "sink_attention"]
        assert {(site.status, site.reason) for site in bare} == {
            (BARE, "attention: its softmax has sinks, which no op takes")
        }


@pytest.mark.parametrize("length", [7, 20])
def test_no_cache(length: int) -> None:
    """A prompt without one: its mask tells packed sequences apart, and stays; the copies of the heads go."""
    model = models.build("Llama", num_hidden_layers=1)
    result = checked(model, verify=True)
    with torch.no_grad():
        result.call(models.tokens(2, length), use_cache=False)
    assert result.oracle.identical
    assert attention_sites(result.report) == ["decode_attention:mask"]


def test_a_cache_that_grows() -> None:
    """All of its keys count; one graph serves every length."""
    model = models.build("Llama", num_hidden_layers=1)
    result = checked(model, dynamic=None)
    tokens = models.tokens(2, 9)
    with torch.no_grad():
        cache = model(tokens[:, :4], use_cache=True).past_key_values
        for position in range(4, 9):
            result.call(tokens[:, position : position + 1], past_key_values=cache)
    assert result.oracle.identical
    assert {tuple(attention_sites(report)) for report in result.reports} == {ALL}


def test_with_quantised_layers() -> None:
    """Both families, and the quantiser after attention reads the op's result where it lies."""
    model = models.build("Llama", num_hidden_layers=1)
    models.QUANTISATIONS["PerRow"](model)
    step = Step("Llama", POSITION)
    result = checked(model, verify=True)
    with torch.no_grad():
        given, fed = prompted(step, model)
        stepped(step, result.call, given, fed, 2)
    assert result.oracle.identical
    assert result.report.replaced == {
        "rms_norm_quant": 3,
        "act_mul_quant": 1,
        "fp8_linear": 5,
        "decode_attention": 1,
    }


# ---- with code -----------------------------------------------------------------------------------------------


def coded(backend: Any, layers: int, count: int, length: int) -> tuple[Any, list[Tensor], str]:
    """The cache and the logits after steps of a compiled Llama, and the code that Inductor generated."""
    torch._dynamo.reset()
    model = models.build("Llama", num_hidden_layers=layers)
    compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    fed = models.tokens(2, count + 4)
    cache = transformers.StaticCache(config=model.config, max_cache_len=length)  # type: ignore[arg-type]
    logits: list[Tensor] = []

    def run() -> None:
        for position in range(4, count + 4):
            logits.append(compiled(fed[:, position : position + 1], past_key_values=cache).logits)

    with torch.no_grad():
        model(fed[:, :4], past_key_values=cache)
        _, codes = run_and_get_code(run)
    return cache, logits, "\n".join(codes)


def same_as_inductor(layers: int, count: int, length: int) -> None:
    cache, logits, code = coded(aiter_fusion.Backend(expect={"decode_attention": layers}), layers, count, length)
    theirs, want, their_code = coded("inductor", layers, count, length)
    assert all(map(same_bits, logits, want))
    for own, other in zip(cache.layers, theirs.layers, strict=True):
        assert same_bits(own.keys, other.keys)
        assert same_bits(own.values, other.values)
    # buffers as long as the cache: copies of it are, in Inductor's code for the heads alone
    buffers = re.compile(rf"empty_strided\w*\(\([^)]*\b{length}, 64\)")
    assert buffers.search(code) is None
    assert buffers.search(their_code) is not None
    assert "index_put" not in code.replace("_index_put_", "")  # by itself it would be a call on a copy


@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_cache_is_not_copied(layers: int) -> None:
    """The op reads what the step has written, in place: the same bits in it as by plain Inductor."""
    same_as_inductor(layers, count=5, length=48)


@pytest.mark.slow
def test_a_long_decode() -> None:
    same_as_inductor(2, count=256, length=272)


@pytest.mark.parametrize(
    ("family", "changes"), [("Llama", {}), pytest.param("Mistral", SLIDING, marks=pytest.mark.slow)]
)
def test_compiled_generate(family: str, changes: dict[str, Any]) -> None:
    """``generate()`` compiles its steps by name; on a CPU only if it is told to."""
    torch._dynamo.reset()
    aiter_fusion.reset()
    model: Any = models.build(family, num_hidden_layers=1, **changes)
    compiling = transformers.CompileConfig(backend="aiter_fusion", mode=cast(str, None))
    compiling._compile_all_devices = True  # type: ignore[assignment]
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    prompt = models.tokens(2, 5)
    eager = model.generate(prompt, **options)
    compiled = model.generate(prompt, **options, cache_implementation="static", compile_config=compiling)
    assert torch.equal(eager, compiled)
    reports = aiter_fusion.reports()
    assert reports
    assert {report.replaced["decode_attention"] for report in reports} == {1}


def test_options() -> None:
    """Level, name, numerics and provider, as for every family."""
    model = models.build("Llama", num_hidden_layers=1)
    result = checked(model)
    with torch.no_grad():
        given, fed = prompted(STEPS[0], model)
        stepped(STEPS[0], result.call, given, fed, 1)
    (captured,) = result.oracle.graphs

    def site(**options: Any) -> str:
        graph = copy_graph(captured.before.graph)
        report = PassManager(config.options(**options)).run(graph, True)
        (found,) = (site for site in report.sites if site.family == "decode_attention")
        return f"{found.status} {found.provider}{found.reason}"

    assert site(disable="decode_attention") == "skipped disabled: decode_attention is in 'disable'"
    assert site(level=2) == "skipped level: needs level 3, this is level 2"
    assert site(level=1, enable="decode_attention", numerics="exact") == "replaced reference"
    assert site(strict=True, provider="reference") == "replaced reference"
