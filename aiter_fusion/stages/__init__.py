"""The stages of the package's own fused ops, one module for each kind."""
