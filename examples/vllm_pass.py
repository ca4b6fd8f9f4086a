"""aiter_fusion's passes inside vLLM, as the custom pass of its post-grad pass manager.

    python examples/vllm_pass.py facebook/opt-125m

vLLM compiles with a backend of its own, so ``backend="aiter_fusion"`` is not an option there; it does take a further
pass. Its own fusions of norms and activations are switched off, and so are its own kernels for them: what remains are
the ATen operations that the forms describe. A norm that vLLM keeps as an operation of its own (``vllm_ir.rms_norm``)
until after this pass is none of them: what it feeds is reported as bare, with that operation as the reason.

Written against vLLM 0.33, by its sources; the contract is tested without vLLM, and it has not been run inside.
"""

from __future__ import annotations

import hashlib
import sys
import uuid
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import aiter_fusion

if not TYPE_CHECKING and find_spec("vllm") is not None:
    from vllm.compilation.passes.inductor_pass import InductorPass  # what vLLM's pass manager accepts: see its add()
else:
    InductorPass = CustomGraphPass


class FusionPass(InductorPass):
    """What vLLM's pass manager calls: ``Backend.graph_pass``, as a pass of vLLM's. Options are those of ``Backend``."""

    def __init__(self, **options: Any) -> None:
        self.fusions = aiter_fusion.Backend(**options).graph_pass()

    def __call__(self, graph: fx.Graph) -> None:
        self.fusions(graph)

    def uuid(self) -> str:
        """A text, since vLLM hashes its passes' uuids as JSON; a new one each time if the result must not be cached."""
        known = self.fusions.uuid()
        return uuid.uuid4().hex if known is None else hashlib.sha256(repr(known).encode()).hexdigest()

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        return True


def compilation_config(**options: Any) -> Any:
    """A ``vllm.config.CompilationConfig`` with the pass, for ``vllm.LLM(..., compilation_config=...)``.

    Raises:
        ImportError: vLLM is not installed.
    """
    from vllm.config import CompilationConfig, PassConfig  # type: ignore[import-not-found]
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

    return CompilationConfig(
        custom_ops=["none"],
        pass_config=PassConfig(fuse_norm_quant=False, fuse_act_quant=False),
        inductor_passes={current_platform.pass_key: FusionPass(**options)},
    )


def main(model: str) -> None:
    if find_spec("vllm") is None:
        raise SystemExit("this example needs vLLM: https://docs.vllm.ai/en/latest/getting_started/installation")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(model, quantization="fp8", compilation_config=compilation_config())
    for output in llm.generate(["What a compiler does is"], SamplingParams(max_tokens=32, temperature=0)):
        print(output.outputs[0].text)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "facebook/opt-125m")
