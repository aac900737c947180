"""Models as files: references, packages, where a tensor's bytes lie. Knows no device and no torch."""
