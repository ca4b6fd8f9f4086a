"""FP8 products of few rows: rules (``rules.py``), launches (``launches.py``), calls (``calls.py``)."""
