"""Random changes to graphs that match, and the property that the pass keeps their bits."""
