"""``aiter-fusion doctor``: every fused op tried on this machine, in processes that may die of it."""
