"""The head's side of a session: hold, route, open, tokens, receipts, settle. Computes no layer itself."""
