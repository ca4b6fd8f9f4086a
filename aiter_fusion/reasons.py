"""Why a site is not replaced: every reason has a code and a sentence, and what follows it is particular to the site."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Reason(Enum):
    """A code, as reports spell it, and its sentence, as ``passes/README.md`` lists it."""

    PRODUCER = "producer", "what is quantised comes from an operation that no fusion takes"
    BOUNDARY = (
        "boundary",
        "the value comes from outside the graph: its producer is an input or in the graph before a break",
    )
    UNQUANTISED = "unquantised", "the value is not quantised"
    GROUPED = "grouped", "a grouped product, of experts, reads the value or made it: none is fused with a quantiser yet"
    UNNORMALISED = "unnormalised", "no RMSNorm reads the all-reduced value"
    UNKNOWN = "unknown", "a cast to FP8 or int8 whose arithmetic no form describes"
    ATTENTION = "attention", "the attention is none that a fused op computes"
    ROWS = "rows", "only some rows of a value are quantised, and the others are needed too or cannot be left out"
    STARVED = "starved", "another site has taken the value that this one would fuse with"
    LEVEL = "level", "the optimisation level does not include this fusion"
    DISABLED = "disabled", "the fusion is switched off by name"
    TRAINING = "training", "the graph is compiled for training"
    COLLECTIVE = (
        "collective",
        "the reduction or its group is none that a fused op takes, or its processes do not compile alike",
    )
    NUMERICS = "numerics", "the provider rounds differently from the graph, and numerics='exact' was asked for"
    NO_KERNEL = "no_kernel", "no provider on this machine has a kernel"
    PROVIDER = "provider", "the provider refuses this call"
    PREFERENCE = "preference", "the provider is to be used only if it is asked for by name"
    UNMEASURED = "unmeasured", "nobody has measured whether the provider's kernel is faster on this GPU"
    SLOWER = "slower", "by the provider's measurements, the graph's own code is faster"
    OVERLOAD = "overload", "no overload of the fused op takes these inputs and returns these outputs"
    LAYOUT = "layout", "an output of the fused op differs in shape, stride, dtype or device from the value it replaces"
    ORDER = "order", "an output is read before the last input exists"
    MUTATION = "mutation", "an input is written to between the nodes that would become one"
    ERROR = "error", "planning the site raised an exception"

    def __init__(self, code: str, sentence: str) -> None:
        self.code, self.sentence = code, sentence


CODES = frozenset(reason.code for reason in Reason)
# Where the graph's own code is thought to be faster, nothing is lost: ``strict`` allows these.
OF_SPEED = frozenset({Reason.SLOWER.code, Reason.UNMEASURED.code})


class Refusal(NamedTuple):
    """A reason and what is particular to the site; as text ``layout: add_3 has dtype ...``."""

    reason: Reason
    particulars: str

    def __str__(self) -> str:
        return f"{self.reason.code}: {self.particulars}"


class Refused(Exception):  # noqa: N818 (no error: the normal way for a site to stay as it is)
    """A site stays as it is, for this reason."""

    def __init__(self, reason: Reason, particulars: str) -> None:
        super().__init__(reason, particulars)
        self.refusal = Refusal(reason, particulars)
