"""``python -m aiter_fusion``: the command line."""

from .cli import main

raise SystemExit(main())
