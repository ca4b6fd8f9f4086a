"""The pass: recognise, plan, rewrite. It knows no model and no op by name; what it looks for is in ``patterns``."""

if __name__ != "aiter_fusion.passes":
    raise ImportError("use 'import aiter_fusion.passes': a second copy would register every op twice")
