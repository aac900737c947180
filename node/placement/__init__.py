"""Which node holds which layer range, and which route a session takes. Pure: no clock, network or disk."""
