#!/bin/sh
# One dependency of libp2p (fastecdsa) has no ready-made wheel: it needs a C compiler, Python's and GMP's headers.
# The engine's own kernels need a C++ compiler; without one it works, more slowly.
# Does nothing where they are; installs Debian's packages as root; else says what to install.
set -eu
python=${1:-python3}

has_all() {
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    printf '#include <gmp.h>\n#include <Python.h>\n' | cc -E -I"$include" - >/dev/null 2>&1
}

has_cpp() {
    command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null
}

has_all && has_cpp && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing compilers and headers: gcc g++ libc6-dev libgmp-dev python3-dev"
    apt-get update --quiet=2
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 --no-install-recommends \
        gcc g++ libc6-dev libgmp-dev python3-dev
fi
has_cpp || echo "note: without a C++ compiler (g++ or clang++) models run more slowly on CPUs" >&2
has_all && exit 0
echo "gpu-pod needs a C compiler and the headers of Python and GMP to build one dependency:" >&2
echo "  Debian, Ubuntu: sudo apt install gcc libc6-dev libgmp-dev python3-dev" >&2
echo "  Fedora:         sudo dnf install gcc gmp-devel python3-devel" >&2
echo "  macOS:          xcode-select --install && brew install gmp" >&2
exit 1
