"""Figures with a peer beside them, as Markdown tables. Never part of the tests."""
