"""`make bench`: every benchmark after the other."""

from __future__ import annotations

import os
import platform

from benchmarks import decode, links

print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n", flush=True)
print("## Decoding\n", flush=True)
decode.main()
print("\n## Stage links\n", flush=True)
links.main()
