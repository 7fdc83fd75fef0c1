#!/usr/bin/env bash
# Builds llama-server and llama-batched-bench out of the source package of the installed
# llama-cpp-python, so that a comparison has the same kernels on both sides. Prints where they are.
#
#   bench/peers/build_llama_server.sh [FOLDER]     default: .peers
#
# Needs a C++ compiler; takes about ten minutes on two cores, once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:-.peers}
python=$PWD/.venv/bin/python
version=$("$python" -c 'from importlib.metadata import version; print(version("llama-cpp-python"))')
mkdir -p "$folder"
cd "$folder"
bin=$PWD/llama-$version/bin

if [ ! -x "$bin/llama-server" ]; then
  sources=llama_cpp_python-$version
  if [ ! -d "$sources" ]; then
    "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python -d . "llama-cpp-python==$version" >&2
    tar xzf "$sources.tar.gz"
  fi
  cmake=$(command -v cmake || true)
  if [ -z "$cmake" ]; then
    "$python" -m venv tools
    tools/bin/pip install --quiet cmake >&2
    cmake=$PWD/tools/bin/cmake
  fi
  "$cmake" -S "$sources/vendor/llama.cpp" -B "llama-$version" -DCMAKE_BUILD_TYPE=Release \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_WEBUI=OFF >&2
  "$cmake" --build "llama-$version" -j "$(getconf _NPROCESSORS_ONLN)" \
    --target llama-server llama-batched-bench >&2
fi
echo "$bin"
