"""What models emit, as data: forms (one way to spell a computation) and fusions (chains of forms with a fused op)."""

if __name__ != "aiter_fusion.patterns":
    raise ImportError("use 'import aiter_fusion.patterns': a second copy would register every op twice")
