"""Stage links: how frames travel between heads and stages.

Knows bytes, lanes and certificates; no model, no accounting.
"""
