"""Keeps libp2p's own log lines off people's terminals. It writes every failed dial as an error, some of it to
the root logger; what matters of it reaches the user through `ControlError`.
"""

from __future__ import annotations

import logging
import os


def silence_libp2p() -> None:
    for name in ("libp2p", "multiaddr", "zeroconf"):
        logger = logging.getLogger(name)
        if not os.environ.get("LIBP2P_DEBUG"):
            logger.addHandler(logging.NullHandler())
            logger.propagate = False
    root = logging.getLogger()
    if not any(isinstance(known, _NotFromLibp2p) for known in root.filters):
        root.addFilter(_NotFromLibp2p())


class _NotFromLibp2p(logging.Filter):
    """A logger's filter sees only what is logged to that very logger: here, `logging.warning()` calls."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "/libp2p/" not in record.pathname.replace(os.sep, "/")
