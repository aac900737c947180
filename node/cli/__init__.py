"""The `pod` command: parses, calls one operation, shows the result. Decides nothing itself."""
