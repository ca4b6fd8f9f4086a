"""``python -m aiter_fusion``: the command line."""

from .cli import main

if __name__ == "__main__":  # processes that a benchmark starts import this module too
    raise SystemExit(main())
