"""What no source of the project may do, whoever calls it: run what a file or a request says."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from settings import ROOT

SOURCES = [
    path
    for path in [*ROOT.rglob("*.py"), ROOT / "scripts" / "licences"]
    if not any(p == "tests" or p.startswith(".") for p in path.relative_to(ROOT).parts)
]

# unpickling runs the file; pickletools, which only names what is in one, does not
FORBIDDEN_IMPORTS = {
    "pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib",
    "jsonpickle", "code", "codeop",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "yaml.load", "yaml.load_all",
    "yaml.full_load", "yaml.unsafe_load", "torch.hub.load", "tempfile.mktemp",
    "jinja2.Environment", "jinja2.Template", "jinja2.environment.Environment",
    "jinja2.nativetypes.NativeEnvironment", "jinja2.sandbox.SandboxedEnvironment",
}  # fmt: skip
# calls that must say this, since the default is the other, or was so in some release
MUST_SAY = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
}
MUST_NOT_SAY = {"shell": True, "allow_pickle": True, "weights_only": False,
                "trust_remote_code": True}  # fmt: skip


def offences(source: str) -> list[str]:
    tree = ast.parse(source)
    names = {name: full for node in ast.walk(tree) for name, full in imported(node)}
    found = [f"imports {full}" for full in names.values() if is_forbidden(full)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [f"line {node.lineno}: {what}" for what in faults(node, names)]
        elif isinstance(node, ast.Name | ast.Attribute):
            # also handed on, as in map(eval, …)
            if (name := full_name(node, names)) in FORBIDDEN_CALLS | MUST_SAY.keys():
                found += [] if is_called(node, tree) else [f"line {node.lineno}: {name} handed on"]
        elif isinstance(node, ast.ClassDef):
            bases = {full_name(base, names) for base in node.bases} & FORBIDDEN_CALLS
            found += [f"line {node.lineno}: a kind of {base}" for base in bases]
    return found


def imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """What a name stands for, by the import that made it."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            full = alias.name if alias.asname else alias.name.partition(".")[0]
            yield alias.asname or full, alias.name if alias.asname else full
            yield f"import {alias.name}", alias.name  # import a.b names a, but b is here too
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def is_forbidden(full: str) -> bool:
    return full.partition(".")[0] in FORBIDDEN_IMPORTS or full in FORBIDDEN_CALLS


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """`torch.load` for `torch.load`, `t.load` and `load`, as they were imported."""
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def is_called(node: ast.expr, tree: ast.AST) -> bool:
    return any(isinstance(call, ast.Call) and call.func is node for call in ast.walk(tree))


def faults(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name = full_name(call.func, names).removeprefix("builtins.")
    said = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
    if name in FORBIDDEN_CALLS:
        yield f"{name}()"
    if name in MUST_SAY and said.get(MUST_SAY[name][0], ...) is not MUST_SAY[name][1]:
        yield f"{name}() without {'='.join(map(str, MUST_SAY[name]))}"
    if name.endswith("import_module") and not isinstance(call.args[0], ast.Constant):
        yield f"{name}() of a name that is not written there"
    for argument, value in MUST_NOT_SAY.items():
        if said.get(argument, ...) is value:
            yield f"{name}({argument}={value})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path: Path) -> None:
    assert offences(path.read_text(encoding="utf-8")) == []


OF_REQUESTS = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("api", "chat")]


@pytest.mark.parametrize("path", OF_REQUESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_reads_requests_knows_no_files(path: Path) -> None:
    """So no path comes out of a request: whoever opens files has them from the settings."""
    assert opened(path.read_text(encoding="utf-8")) == []


def test_what_opens_a_file_is_found() -> None:
    for source in ("import os", "from pathlib import Path", "open(x)", "FileResponse(x)"):
        assert opened(source)


def opened(source: str) -> list[str]:
    tree = ast.parse(source)
    modules = {full.partition(".")[0] for node in ast.walk(tree) for _, full in imported(node)}
    called = {full_name(node.func, {}) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return sorted(
        modules & {"os", "pathlib", "shutil", "tempfile", "glob", "io", "subprocess"}
        | called & {"open", "FileResponse", "StaticFiles"}
    )


CALENDAR = {"time.time", "time.time_ns", "datetime.datetime.now", "datetime.datetime.utcnow"}
# what clients or files are told; everything else measures, and a clock that is set would upset it
TELLS_THE_TIME = {
    "api/generation.py", "api/prompt.py", "api/rerank.py", "api/responses.py", "cache.py",
    "cache_disk.py", "cache_file.py",
}  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_measures_time_does_not_look_at_the_calendar(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() not in TELLS_THE_TIME:
        assert not dates(path.read_text(encoding="utf-8"))


def test_who_looks_at_the_calendar_is_found() -> None:
    for source in ("import time\nt = time.time", "from time import time\ntime()"):
        assert dates(source)
    assert dates("from datetime import datetime\ndatetime.now()")
    assert not dates("import time\ntime.monotonic()")


def dates(source: str) -> set[str]:
    tree = ast.parse(source)
    names = {name: full for node in ast.walk(tree) for name, full in imported(node)}
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute))
    return {full_name(node, names) for node in nodes} & CALENDAR


def test_all_sources_are_looked_at() -> None:
    found = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert {"server.py", "engine/torch_file.py", "models/convert/bge_m3.py"} <= found
    assert len(found) > 60


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import os, marshal",
        "def f():\n    import shelve",
        "eval('1')",
        "exec(text)",
        "compile(text, '', 'exec')",
        "map(eval, texts)",
        "import builtins\nbuiltins.eval('1')",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch as t\nt.load(path, weights_only=flag)",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path)",
        "import torch\nmap(torch.load, paths)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import jinja2\njinja2.Environment()",
        "import jinja2\njinja2.Template(text)",
        "from jinja2 import Environment",
        "from jinja2 import Environment as E\nE()",
        "from jinja2.sandbox import SandboxedEnvironment",  # whose lists templates can change
        "import jinja2\nclass E(jinja2.Environment): pass",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import os\nos.system(text)",
        "import asyncio\nasyncio.create_subprocess_shell(text)",
        "import yaml\nyaml.load(text)",
        "from yaml import load\nload(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "import importlib\nimportlib.import_module(name)",
    ],
)
def test_what_is_looked_for_is_found(source: str) -> None:
    assert offences(source)


@pytest.mark.parametrize(
    "source",
    [
        "import pickletools",
        "model.eval()",
        "re.compile(text)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "from jinja2.sandbox import ImmutableSandboxedEnvironment\nImmutableSandboxedEnvironment()",
        "import subprocess\nsubprocess.run([text], shell=False)",
        "import yaml\nyaml.safe_load(text)",
        "import importlib\nimportlib.import_module('torch')",
    ],
)
def test_what_is_harmless_is_let_through(source: str) -> None:
    assert offences(source) == []
