"""The provider ``aiter``: AMD's AITER. Importing this package imports no AITER."""
