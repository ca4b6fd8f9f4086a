"""Benchmarks: the fused ops alone (``ops``), and a whole model (``model``), against plain Inductor on the same GPU."""
