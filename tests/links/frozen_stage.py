"""A stage in a process of its own, for a test to freeze: prints its address, then lives until killed."""

from __future__ import annotations

import sys
import threading

from node.links.tls_links import TlsLinks
from tests.links.ends import KEYS, POD, ROSTER

links = TlsLinks(
    KEYS[1], POD, "127.0.0.1:0", lambda peer, frame: None, lambda peer, why: None, lambda head, why: None
)
links.set_trust(ROSTER)
peer, address = KEYS[0].public, sys.argv[1]
links.connect(peer, address, 5)
print(links.data_address, flush=True)
threading.Event().wait(60)
