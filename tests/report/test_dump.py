"""Depyf, ``aiter_fusion.dump``, TORCH_LOGS and the structured trace show the graphs before and after the passes."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import depyf
import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._logging._internal import trace_log

import aiter_fusion
from support.checked import checked
from support.one_site import UserPass, inputs, site
from support.scripts import SCRIPT, run_script


def compiled(**options) -> None:
    with torch.no_grad():
        torch.compile(site, backend="aiter_fusion", options=options)(*inputs())


def graph(folder: Path, stage: str) -> str:
    """What depyf wrote for a stage."""
    (file,) = folder.glob(f"__compiled_fn_*.{stage}.0.py")
    return file.read_text()


def test_depyf(tmp_path: Path) -> None:
    """The graph before and after each pass, the user's own too, in an order that the names say."""
    with inductor_config.patch(force_disable_caches=True), depyf.prepare_debug(str(tmp_path)):
        compiled(post_grad_custom_pre_pass=UserPass())
    stages = sorted(path.name.split(".")[1] for path in tmp_path.glob("*AITER_FUSION*"))
    assert stages == ["AITER_FUSION_0_before", "AITER_FUSION_1_after_UserPass", "AITER_FUSION_2_after_fusions"]
    for stage in stages[:2]:
        assert "torch.ops.aten.rsqrt.default(" in graph(tmp_path, stage)
        assert "torch.ops.aiter_fusion" not in graph(tmp_path, stage)
    after = graph(tmp_path, stages[2])
    assert "rms_norm_quant_default = torch.ops.aiter_fusion.rms_norm_quant.default(arg" in after
    assert '"f8e4m3fn[4, 256]"' in after
    assert "rsqrt" not in after


def test_dump(tmp_path: Path) -> None:
    """One line, though the model is compiled already and in Inductor's cache; the index lists every file in order."""
    compiled()
    folder = tmp_path / "new" / "dump"
    with aiter_fusion.dump(folder):
        compiled()
    index = (folder / "index.md").read_text()
    listed = re.findall(r"^(?:\d+\.|-) (?:\*\*)?\[([^]]+)\]\(\1\)(?:$|: )", index, re.MULTILINE)
    assert {*listed, "index.md", "report.html"} == {path.name for path in folder.iterdir()}
    (function,) = {name.partition(".")[0] for name in listed if name.startswith("__compiled_fn_")}
    assert f"## {function}, called by `site`\n" in index
    marked = re.findall(r"\*\*\[([^]]+)\].*: (before|after) the fusions\*\*", index)
    assert [name.split(".")[1] for name, _ in marked] == ["AITER_FUSION_0_before", "AITER_FUSION_1_after_fusions"]
    stages = [name.split(".")[1] for name in listed if name.startswith("__compiled_fn_")]
    order = ["Forward_graph", "AITER_FUSION_0_before", "AITER_FUSION_1_after_fusions", "AFTER_POST_GRAD", "kernel_0"]
    assert [stage for stage in stages if stage in order] == order
    for stage in ("AITER_FUSION_1_after_fusions", "AFTER_POST_GRAD"):
        assert re.search(
            r"ops\.aiter_fusion\.rms_norm_quant\.\w+\(x=arg\w+, weight=arg\w+, eps=1e-", graph(folder, stage)
        )
        assert "quant_dtype=torch.float8_e4m3fn, provider='reference')" in graph(folder, stage)
    (generated,) = folder.glob("__compiled_fn_*.kernel_0.py")
    compile(generated.read_text(), generated.name, "exec")
    assert re.search(r"= torch\.ops\.aiter_fusion\.rms_norm_quant\.\w+\(x=", generated.read_text())
    assert "replaced 1 of 1 sites (rms_norm_quant 1)" in index
    assert '"graphs": [{' in (folder / "report.html").read_text()
    _, made = aiter_fusion.reports()
    assert not made.from_cache
    assert not inductor_config.force_disable_caches
    with pytest.raises(FileExistsError, match="is not empty: name a new folder"), aiter_fusion.dump(folder):
        pass


def broken(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    result = site(x, w)
    torch._dynamo.graph_break()
    return tuple(value.float() * 2 for value in result)


def test_a_dump_of_two_graphs(tmp_path: Path) -> None:
    """Each stands with its own report and with the function that calls it."""
    with aiter_fusion.dump(tmp_path / "dump"), torch.no_grad():
        torch.compile(broken, backend="aiter_fusion")(*inputs())
    first, second = re.split(
        r"^## __compiled_fn_\d+, called by ", (tmp_path / "dump" / "index.md").read_text(), flags=re.M
    )[1:]
    assert first.startswith("`broken`\n")
    assert "Compilation 0/0:\n\n```\nreplaced 1 of 1 sites" in first
    assert second.startswith("`torch_dynamo_resume_in_broken_")
    assert "Compilation 1/0:\n\n```\nreplaced 0 of 0 sites" in second


def test_a_dump_of_nothing(tmp_path: Path) -> None:
    with aiter_fusion.dump(tmp_path / "dump"):
        checked(site)
    index = (tmp_path / "dump" / "index.md").read_text()
    assert "Nothing was compiled" in index


class Trace(logging.Handler):
    """Collects the artifacts that the package adds to the structured trace, by name."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.artifacts: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        name = record.metadata.get("artifact", {}).get("name", "")  # type: ignore[attr-defined]
        if name.startswith("aiter_fusion"):
            assert record.metadata["frame_id"] == 0, "tlparse files it with its compilation"  # type: ignore[attr-defined]
            self.artifacts[name] = record.payload  # type: ignore[attr-defined]


def test_the_structured_trace() -> None:
    """What tlparse reads: graphs before and after, and a summary, that of a cache hit too."""
    for cached in (False, True):
        trace = Trace()
        trace_log.addHandler(trace)
        try:
            compiled()
        finally:
            trace_log.removeHandler(trace)
        torch._dynamo.reset()
        summary = json.loads(trace.artifacts.pop("aiter_fusion_summary"))
        assert summary["replaced"] == {"rms_norm_quant": 1}
        assert summary["from_cache"] == cached
        assert sorted(trace.artifacts) == ([] if cached else ["aiter_fusion_0_before", "aiter_fusion_1_after_fusions"])
        if not cached:
            before, after = trace.artifacts.values()
            assert "aten.rsqrt" in before
            assert "f8e4m3fn[4, 256][256, 1]cpu" in after
            assert "torch.ops.aiter_fusion.rms_norm_quant.default(" in after


def test_torch_logs(tmp_path: Path) -> None:
    """Torch imports the package while it is itself being imported, and shows its lines down to DEBUG."""
    done = run_script(SCRIPT, tmp_path, TORCH_LOGS="+aiter_fusion,post_grad_graphs")
    assert json.loads(done.stdout)["replaced"] == {"rms_norm_quant": 1}
    (summary,) = (line for line in done.stderr.splitlines() if "replaced 1 of 1 sites" in line)
    assert summary.startswith("I")  # torch's format, once
    assert "aiter_fusion: replaced rms_norm_quant token+value at ?: aiter_fusion::rms_norm_quant.value" in done.stderr
    assert "===== AITER_FUSION 0 before =====" in done.stderr
    assert done.stderr.index("AITER_FUSION 1 after fusions") < done.stderr.index("AFTER POST GRAD")
