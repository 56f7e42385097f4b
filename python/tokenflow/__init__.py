"""tokenflow: a tokenizer for images with a semantic and a pixel codebook under one index, and what trains and uses it."""

__version__ = "0.1.0"
