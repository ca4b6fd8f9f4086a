"""What the user wants: options, levels and the environment's preferences, checked in one place."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .reasons import Reason, Refusal
from .registry import REGISTRY

NUMERICS = ("exact", "kernel")
LEVELS = {
    0: "nothing, as plain Inductor",
    1: "norms and activations before a quantiser, with the graph's own roundings",
    2: "also with a kernel's roundings, with second outputs, Gemma's weight offset and given scales",
    3: "also all-reduces, FP8 linear layers and the attention of decode steps",
}
DEFAULT_LEVEL = 3


@dataclass(frozen=True)
class Preference:
    """What the environment may prefer of AITER, as ``AITER_FUSION_<name>=1`` or ``0``.

    default: what holds where the environment says nothing.
    ops:     the ops that it is about, by their names in ``torch.ops.aiter_fusion``; None: all.
    """

    default: bool
    ops: tuple[str, ...] | None = None


_PRODUCTS = ("gemm_a8w8", "gemm_a8w8_blockscale", "gemm_a8w8_bpreshuffle", "gemm_a8w8_blockscale_bpreshuffle")
_PRODUCTS += ("hipb_mm_fp8", "batched_gemm_a8w8", "gemm_a4w4", "gemm_a8wfp4")
_ROUTING = ("topk_softmax", "fused_topk", "topk_sigmoid", "topk_gating", "grouped_topk", "biased_grouped_topk")

# A preference decides what is chosen unasked; it never stands in the way of what is asked for by name.
PREFERENCES = {
    "AITER": Preference(True),
    "RMSNORM": Preference(True, ("rms_norm_quant", "rms_norm", "add_rms_norm")),
    "ACT": Preference(True, ("act_mul_quant",)),
    "ALLREDUCE": Preference(True, ("all_reduce_rms_norm", "all_reduce_rms_norm_quant")),
    "LAYERNORM": Preference(True, ("layer_norm", "add_layer_norm")),
    "LINEAR": Preference(True, _PRODUCTS),
    "LINEAR_HIPBMM": Preference(False, ("hipb_mm_fp8",)),  # wants tuning, and prepared weights to be at its best
    "LINEAR_SIDE_BY_SIDE": Preference(False, ("fp8_linear",)),  # wants prepared weights to gain anything
    "MHA": Preference(True, ("flash_attn", "flash_attn_varlen", "flash_attn_varlen_lse", "decode_attention")),
    "MLA": Preference(True, ("mla_decode_fwd", "mla_decode_fwd_lse", "mla_decode_metadata", "mla_prefill_fwd")),
    "MOE": Preference(True, ("fused_moe", "asm_moe_tkw1", "moe_sum")),
    "PAGED_ATTN": Preference(True, ("paged_attention", "reshape_and_cache")),
    "QUANT": Preference(True, ("token_quant", "group_quant", "tensor_quant", "static_quant")),
    "ROTARY": Preference(True, ("rotary_embedding", "rotary_embedding_")),
    "SAMPLING": Preference(True, ("greedy_sample", "mixed_sample", "top_k_renorm_probs")),
    "TOPK": Preference(True, _ROUTING),
    # about memory that models allocate, and so about no op: ``bridge.preferred_kv_layout`` says it
    "SHUFFLE_KV_CACHE": Preference(False, ()),
}
_WORDS = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}


def preference(name: str) -> bool:
    """What the environment prefers, a key of ``PREFERENCES``.

    Raises:
        ValueError: the variable is set to something that is neither yes nor no.
    """
    variable = f"AITER_FUSION_{name}"
    text = os.environ.get(variable, "").strip().lower()
    if text and text not in _WORDS:
        raise ValueError(f"{variable}={text!r}: must be one of {', '.join(_WORDS)}")
    if not text and name == "LINEAR_HIPBMM" and tuning() is not None:
        return True  # who names a folder for what hipBLASLt tunes wants hipBLASLt
    return _WORDS[text] if text else PREFERENCES[name].default


def tuning() -> Path | None:
    """The folder in which hipBLASLt is to keep what it tunes while a model runs, from ``AITER_FUSION_TUNING``; None: it
    is not to tune. The first call of every shape then takes minutes."""
    text = os.environ.get("AITER_FUSION_TUNING", "").strip()
    return Path(text).expanduser().absolute() if text else None


def against(op: str) -> list[str]:
    """Which preferences that are about an op are off, each as the setting that would turn it on."""
    about = [name for name, known in PREFERENCES.items() if known.ops is None or op in known.ops]
    return [f"AITER_FUSION_{name} is off (set it to 1)" for name in about if not preference(name)]


@dataclass(frozen=True)
class Options:
    """The options of one backend, as documented at ``aiter_fusion.Backend``; hashable and picklable."""

    level: int = DEFAULT_LEVEL
    provider: str = "auto"
    numerics: str | None = None
    strict: bool = False
    expect: tuple[tuple[str, int], ...] | None = None
    verify: bool = False
    disable: frozenset[str] = frozenset()
    enable: frozenset[str] = frozenset()

    @property
    def allows_kernel_numerics(self) -> bool:
        """Whether a provider may round differently from the graph."""
        return self.numerics == "kernel" if self.numerics is not None else self.level >= 2

    def why_not(self, family: str, needed: int) -> Refusal | None:
        """Why a fusion of this family that needs this level is not wanted, or None if it is."""
        if family in self.disable:
            return Refusal(Reason.DISABLED, f"{family} is in 'disable'")
        if family in self.enable or self.level >= needed:
            return None
        return Refusal(Reason.LEVEL, f"needs level {needed}, this is level {self.level}")

    @property
    def does_nothing(self) -> bool:
        """Whether no fusion can happen, so that the passes need not run."""
        return self.level == 0 and not self.enable


NAMES = tuple(field.name for field in fields(Options))


def options(
    *,
    level: int | None = None,
    provider: str | None = None,
    numerics: str | None = None,
    strict: bool = False,
    expect: Mapping[str, int] | None = None,
    verify: bool = False,
    disable: str | Iterable[str] = (),
    enable: str | Iterable[str] = (),
) -> Options:
    """Check the options and fill in what the environment prefers.

    None means "not said": then ``AITER_FUSION_LEVEL`` and ``AITER_FUSION_PROVIDER`` decide, else level 3 and
    ``auto``. ``AITER_FUSION_DISABLE`` (names separated by commas) applies to families that ``enable`` does not name.

    Raises:
        ValueError: an option has no such value; the message names the valid ones.
    """
    level_source, provider_source = "level", "provider"
    if level is None and (text := os.environ.get("AITER_FUSION_LEVEL", "").strip()):
        level_source = "AITER_FUSION_LEVEL"
        level = int(text) if text.isdecimal() else text  # type: ignore[assignment]
    level = DEFAULT_LEVEL if level is None else level
    if type(level) is not int or level not in LEVELS:
        raise ValueError(f"{level_source}={level!r}: levels are " + ", ".join(f"{n} ({t})" for n, t in LEVELS.items()))
    if provider is None and (text := os.environ.get("AITER_FUSION_PROVIDER", "").strip().lower()):
        provider_source, provider = "AITER_FUSION_PROVIDER", text
    provider = "auto" if provider is None else provider
    providers = ("auto", *REGISTRY.providers)
    if provider not in providers:
        raise ValueError(_unknown(f"{provider_source}={provider!r}: no such provider", provider, providers))
    if numerics is not None and numerics not in NUMERICS:
        raise ValueError(_unknown(f"numerics={numerics!r}: no such numerics", numerics, NUMERICS))
    for name, value in (("strict", strict), ("verify", verify)):
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: must be True or False")
    enabled = _families("enable", enable)
    disabled = _families("disable", disable)
    if both := enabled & disabled:
        raise ValueError(f"{', '.join(sorted(both))} in both 'enable' and 'disable'; keep one")
    preferred = [name.strip() for name in os.environ.get("AITER_FUSION_DISABLE", "").split(",") if name.strip()]
    disabled |= _families("AITER_FUSION_DISABLE", preferred) - enabled
    expected = None
    if expect is not None:
        if not isinstance(expect, Mapping):
            raise ValueError(f"expect={expect!r}: must map families to counts, e.g. {{'rms_norm_quant': 9}}")
        _families("expect", expect)
        if not all(type(count) is int and count >= 0 for count in expect.values()):
            raise ValueError(f"expect={dict(expect)!r}: counts are whole numbers")
        expected = tuple(sorted(expect.items()))
    return Options(level, provider, numerics, strict, expected, verify, disabled, enabled)


def timeout() -> float:
    """For how many seconds a fused all-reduce waits for a late rank; ``AITER_FUSION_TIMEOUT``.

    By default longer than a cold compile of another rank takes (AITER's own builds: 944 s were seen).

    Raises:
        ValueError: it is not a number above 0.
    """
    return _seconds(os.environ.get("AITER_FUSION_TIMEOUT") or "1800")


@functools.cache
def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e6:
        raise ValueError(f"AITER_FUSION_TIMEOUT={text!r}: a number of seconds above 0")
    return seconds


def split(given: Mapping[str, Any], inductor_keys: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """Split ``torch.compile``'s options into ours, Inductor's and ``mode``.

    Raises:
        ValueError: a key is neither; the message names the nearest that is.
    """
    known = set(inductor_keys)
    ours, inductor, mode = {}, {}, None
    for key, value in given.items():
        if not isinstance(key, str):
            raise ValueError(_unknown(f"unknown option {key!r}", key, NAMES))
        if key in NAMES:
            ours[key] = value
        elif key == "mode":
            mode = value
        elif key.replace("-", "_") in known:
            inductor[key.replace("-", "_")] = value
        else:
            raise ValueError(_unknown(f"unknown option {key!r}", key, [*NAMES, "mode", *known], show=NAMES))
    return ours, inductor, mode


def _families(option: str, names: str | Iterable[str]) -> frozenset[str]:
    if not isinstance(names, Iterable):
        valid = ", ".join(REGISTRY.family_names)
        raise ValueError(f"{option}={names!r}: must be the name of a fusion, or several. Valid: {valid}.")
    given = [names] if isinstance(names, str) else list(names)
    for name in given:
        if name not in REGISTRY.family_names:
            raise ValueError(_unknown(f"{option}: no fusion is called {name!r}", name, REGISTRY.family_names))
    return frozenset(given)


def _unknown(problem: str, name: Any, valid: Iterable[str], show: Iterable[str] | None = None) -> str:
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1) if isinstance(name, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{problem}{hint} Valid: {', '.join(show if show is not None else valid)}."
