"""The provider ``triton``: this project's own kernels. Importing this package imports no Triton."""
