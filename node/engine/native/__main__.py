"""`python -m node.engine.native`: compile the kernels ahead of the first start."""

from __future__ import annotations

import sys

from node.engine.native.build import NoKernels, load_kernels

try:
    load_kernels()
except NoKernels as error:
    print(f"no C++ kernels, models will run more slowly on CPUs: {error}", file=sys.stderr)
