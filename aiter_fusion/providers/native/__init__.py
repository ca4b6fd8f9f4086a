"""The provider ``torch``: PyTorch's own scaled matrix product."""
