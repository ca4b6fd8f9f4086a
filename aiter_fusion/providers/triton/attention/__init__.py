"""Attention of a decode step: rules (``rules.py``), launches (``launches.py``), calls (``calls.py``)."""
