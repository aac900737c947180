"""The engine: one process per device that runs this node's shards. Knows layers and frames, not HTTP."""
