"""`python -m node` is the `pod` command."""

from node.cli.main import run

run()
