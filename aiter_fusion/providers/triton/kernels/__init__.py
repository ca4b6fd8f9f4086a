"""The Triton kernels. They import triton, so nothing may import them before a kernel is wanted."""
