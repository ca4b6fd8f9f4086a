"""All-reduce fusions over symmetric memory (``../README.md`` has the protocol)."""
