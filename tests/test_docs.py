"""What the documents say is what the code does, and imports go one way."""

import ast
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from anthropic.types import MessageCountTokensParams, message_create_params
from fastapi.routing import iter_route_contexts
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params

from api import (
    chat,
    chat_request,
    completions,
    embeddings,
    messages,
    rerank,
    responses,
    sampling,
    tokens,
)
from api.chat_request import ChatRequest
from api.completions import CompletionRequest
from api.embeddings import EmbeddingRequest
from api.messages_request import MessagesRequest, PromptRequest
from api.rerank import RerankRequest
from api.responses_request import ResponsesRequest
from api.sampling import CONSTRAINTS
from engine.wire import MAX_GRAMMAR_BYTES
from errors import ServiceError
from server import EXPOSED_HEADERS, create_app
from settings import (
    ROOT,
    ServerSettings,
    Settings,
    TierSettings,
    known_keys,
    unknown_keys,
)
from tests.serving import remembering, serving, settings

CHAT_PARAMS = (
    chat_params.CompletionCreateParamsNonStreaming,
    chat_params.CompletionCreateParamsStreaming,
)
RESPONSE_PARAMS = (
    response_create_params.ResponseCreateParamsNonStreaming,
    response_create_params.ResponseCreateParamsStreaming,
)
MESSAGE_PARAMS = (
    message_create_params.MessageCreateParamsNonStreaming,
    message_create_params.MessageCreateParamsStreaming,
)
COMPLETION_PARAMS = (
    completion_create_params.CompletionCreateParamsNonStreaming,
    completion_create_params.CompletionCreateParamsStreaming,
)

DOCUMENTS = [
    "README.md",
    "CLAUDE.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/api.md",
    "docs/licences.md",
    "docs/performance.md",
]


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def table_rows(text: str) -> Iterator[list[str]]:
    """The cells of every table row."""
    for line in text.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def default_text(default: object) -> str:
    """A default as one writes it in .env; nothing where the code decides."""
    if default is None or default == []:
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)


def server_defaults() -> dict[str, str]:
    fields = ServerSettings.model_fields.items()
    return {name.upper(): default_text(field.default) for name, field in fields}


def tier_defaults(prefix: str) -> dict[str, str]:
    fields = TierSettings.model_fields.items()
    return {prefix + name.upper(): default_text(field.default) for name, field in fields}


# .env.example

DEFAULT = re.compile(r"# ([A-Z_]+)=(.*)")
EXAMPLE = re.compile(r"#     ([A-Z_]+)=(.*)")


def uncommented(pattern: re.Pattern[str], path: Path) -> Path:
    """An env file of the lines of .env.example that match."""
    found = filter(None, map(pattern.fullmatch, read(".env.example").splitlines()))
    path.write_text("".join(f"{m[1]}={m[2]}\n" for m in found))
    return path


def test_the_example_file_changes_nothing_as_it_is() -> None:
    assert all(not line or line.startswith("#") for line in read(".env.example").splitlines())
    assert Settings.load(ROOT / ".env.example") == Settings.load(None)


def test_the_example_file_has_every_key_once_in_order_with_its_default(tmp_path: Path) -> None:
    found = filter(None, map(DEFAULT.fullmatch, read(".env.example").splitlines()))
    keys = [(match[1], match[2]) for match in found]
    assert [key for key, _ in keys] == known_keys()
    defaults = server_defaults()
    for tier in ("LIGHT_", "MEDIUM_", "HEAVY_", "EMBEDDING_", "RERANKER_"):
        defaults |= tier_defaults(tier)
    assert dict(keys) == defaults
    assert Settings.load(uncommented(DEFAULT, tmp_path / ".env")) == Settings.load(None)


def test_every_key_is_explained_at_its_first_tier() -> None:
    lines = read(".env.example").splitlines()
    for n, line in enumerate(lines):
        match = DEFAULT.fullmatch(line)
        if match and match[1] in server_defaults() | tier_defaults("LIGHT_"):
            sentence = lines[n - 1]
            assert re.fullmatch(r"# .+\.", sentence), f"{match[1]} is not explained: {sentence!r}"
            assert lines[n - 2] == "", f"the explanation of {match[1]} has more than one line"


def test_the_examples_in_the_example_file_load(tmp_path: Path) -> None:
    path = uncommented(EXAMPLE, tmp_path / ".env")
    assert not {key for key, _ in unknown_keys(path)} - {key for key, _ in unknown_keys(None)}
    assert list(Settings.load(path).tiers) == ["light", "medium", "embedding", "reranker"]


# tables


def test_the_readmes_settings_are_all_settings_with_their_defaults() -> None:
    rows = [
        row for row in table_rows(read("README.md")) if re.match(r"`(<TIER>_)?[A-Z_]+`$", row[0])
    ]
    written = {row[0].strip("`"): row[1] for row in rows}
    assert len(written) == len(rows)
    defaults = server_defaults() | tier_defaults("<TIER>_")
    assert list(written) == list(defaults)
    for key, default in defaults.items():
        if default:
            assert written[key] == f"`{default}`", key
        else:  # in words
            assert not re.fullmatch(r"`[^`]*`|", written[key]), key


@pytest.mark.parametrize("document", ["README.md", "CLAUDE.md"])
def test_the_endpoint_table_is_the_routes(document: str) -> None:
    app = create_app(Settings.load(None))
    routes = {
        (method, re.sub(r":\w+}", "}", context.path or ""))
        for context in iter_route_contexts(app.routes)
        for method in context.methods or ()
    }
    # HEAD comes with GET, and /docs has a page of its own for signing in
    routes = {(m, path) for m, path in routes if m != "HEAD" and not path.startswith("/docs/")}
    rows = [row for row in table_rows(read(document)) if row[0] in ("GET", "POST", "DELETE")]
    assert len(rows) == len(routes)
    assert {(row[0], row[1].strip("`")) for row in rows} == routes


# commands, snippets, links


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_script_that_is_named_can_be_run(document: str) -> None:
    for name in set(re.findall(r"(?:\./\w+\.sh|scripts/\w+)", read(document))):
        assert os.access(ROOT / name, os.X_OK), f"{document} names {name}"
    for name in set(re.findall(r"python ([\w/]+\.py)", read(document))):
        assert (ROOT / name).is_file(), f"{document} names {name}"


def snippets(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(document), re.S | re.M)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_snippets_parse(document: str) -> None:
    for snippet in snippets(document, "python"):
        ast.parse(snippet)
    for snippet in snippets(document, "json"):
        json.loads(snippet)


def test_the_readme_has_a_request_that_is_valid_for_curl_and_python() -> None:
    models = {
        "/v1/chat/completions": ChatRequest,
        "/v1/embeddings": EmbeddingRequest,
        "/v1/rerank": RerankRequest,
    }
    requests = re.findall(r"^curl \S+?(/v1/\S+).*?-d '(\{.*?\})'$", read("README.md"), re.M | re.S)
    assert {path for path, _ in requests} == models.keys()
    for path, body in requests:
        models[path].model_validate_json(body)
    assert snippets("README.md", "python")


def test_the_settings_in_the_readmes_examples_load(tmp_path: Path) -> None:
    blocks = [text for text in snippets("README.md", "bash") if "_MODEL_PATH=" in text]
    path = tmp_path / ".env"
    for block, tiers in zip(
        blocks,
        # as the text below says
        (
            ["embedding"],
            ["light", "medium"],
            ["light", "heavy"],
            ["light", "medium", "heavy", "embedding"],
        ),
        strict=True,
    ):
        path.write_text(block)
        assert not {key for key, _ in unknown_keys(path)} - {key for key, _ in unknown_keys(None)}
        assert list(Settings.load(path).tiers) == tiers


def test_the_origins_of_applications_in_the_readme_are_served_where_they_are_named() -> None:
    (line,) = re.findall(r".*browsers inside.*", read("README.md"))
    origins = re.findall(r"`(\S+://[^`]+)`", line.replace("…", "an-id"))
    assert "app://obsidian.md" in origins
    for named, status in ([], 400), (origins, 200):
        with serving(settings({"cors_origins": named, "api_keys": ["k"]})) as service:
            for origin in origins:
                asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
                reply = service.http.options("/v1/chat/completions", headers=asks)
                assert reply.status_code == status


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", read(document)):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = (ROOT / document).parent / file if file else ROOT / document
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


# the tree

PACKAGES = ("api", "bench", "chat", "engine", "examples", "models")


def module_files() -> dict[str, Path]:
    """Every module of the project by name, without the tests."""
    files = [*ROOT.glob("*.py")]
    for package in PACKAGES:
        files += (ROOT / package).rglob("*.py")
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


MODULES = module_files()


def test_the_tree_in_the_architecture_is_the_tree() -> None:
    (tree,) = (t for t in snippets("docs/architecture.md", "") if "server.py" in t)
    written, folder = [], ""
    for line in tree.splitlines():
        for name in line[:29].split(", "):
            stripped = name.strip()
            if stripped.endswith("/"):
                folder = stripped
            else:
                written.append(folder + stripped if name.startswith("  ") else stripped)
    assert all((ROOT / name).is_file() for name in written), written
    modules = {path.relative_to(ROOT) for path in MODULES.values() if path.stem != "__init__"}
    assert {Path(name) for name in written if name.endswith(".py")} == modules


# Which modules of ours a module may import, by the most specific name that fits the importer. A
# package stands for all that is in it.
MAY_IMPORT = {
    "server": {
        "answers",
        "api",
        "cache",
        "cache_disk",
        "chat",
        "engine",
        "errors",
        "logs",
        "lookups",
        "model_manager",
        "settings",
        "tier",
    },
    "worker": {
        "embedders",
        "encoder_jobs",
        "encoder_requests",
        "engine",
        "errors",
        "generation_jobs",
        "logs",
        "rerankers",
        "worker_requests",
    },
    "generation_jobs": {"engine", "errors", "worker_requests"},
    "encoder_jobs": {"embedders", "encoder_requests", "engine", "errors", "worker_requests"},
    "encoder_requests": {
        "embedders",
        "engine",
        "errors",
        "lengths",
        "rerankers",
        "worker_requests",
    },
    "worker_requests": {"engine", "errors"},
    "rerankers": {"embedders", "engine", "errors"},
    "embedders": {"engine"},
    "model_manager": {
        "engine.client",
        "engine.machine",
        "engine.types",
        "errors",
        "metrics",
        "progress",
        "room",
        "settings",
        "tier",
    },
    "lengths": {"engine.wire", "errors"},
    "room": {"errors"},
    "footprint": {"engine.llama_limits", "engine.model_file", "engine.wire"},
    "metrics": set(),
    "tier": {
        "encoding",
        "engine.client",
        "engine.wire",
        "engine.model_file",
        "errors",
        "generating",
        "hub_model",
        "lengths",
        "metrics",
        "progress",
        "room",
        "settings",
        "waiting",
        "worker_life",
        "worker_spec",
    },
    "worker_life": {
        "engine.client",
        "engine.wire",
        "engine.model_file",
        "errors",
        "footprint",
        "metrics",
        "model_source",
        "progress",
        "room",
        "settings",
        "worker_spec",
    },
    "model_source": {
        "engine.chat_folder",
        "engine.file_names",
        "engine.model_file",
        "engine.model_folder",
        "engine.backends.fake",
        "hub",
        "hub_model",
        "errors",
        "settings",
        "worker_spec",
    },
    "generating": {"engine.client", "engine.wire", "errors", "metrics"},
    "cache": {"cache_disk", "cache_file"},
    "cache_disk": {"cache_file"},
    "cache_file": set(),
    "flights": {"errors"},
    "caching": set(),
    "answers": {"cache", "caching", "engine.wire", "flights", "generating", "tier"},
    "lookups": {
        "cache",
        "caching",
        "embedders",
        "encoding",
        "engine.types",
        "engine.wire",
        "errors",
        "flights",
        "lengths",
        "rerankers",
        "tier",
    },
    "encoding": {"engine.client", "engine.wire", "engine.types", "errors"},
    "waiting": set(),
    "worker_spec": {
        "engine.llama_limits",
        "engine.machine",
        "engine.wire",
        "engine.model_file",
        "settings",
    },
    "settings": {"hub", "hub_model"},
    "hub": {"errors", "hub_download", "hub_model"},
    "hub_download": {"errors"},
    "hub_model": {"engine.file_names", "errors"},
    "errors": set(),
    "logs": set(),
    "progress": {"logs"},
    "api": {
        "answers",
        "api",
        "cache",
        "caching",
        "chat",
        "engine.wire",
        "engine.types",
        "engine.model_file",
        "engine.grammar_text",
        "generating",
        "lookups",
        "metrics",
        "model_manager",
        "tier",
        "settings",
        "errors",
    },
    "chat": {"chat", "engine.grammar_text", "engine.wire", "engine.model_file", "errors"},
    "engine": {"engine", "errors"},
    "engine.client": {"engine.wire", "errors"},
    "engine.wire": {"engine.types"},
    "engine.scheduler": {
        "engine.backends.base",
        "engine.cells",
        "engine.marks",
        "engine.pace",
        "engine.prefix",
        "engine.speculation",
        "engine.types",
    },
    "engine.threads": {"engine.machine"},
    "engine.apart": set(),
    "engine.cells": {"engine.backends.base", "engine.marks", "engine.prefix"},
    "engine.marks": {"engine.prefix"},
    "engine.batcher": set(),
    "engine.llama_limits": set(),
    "engine.machine": set(),
    "engine.prefix": set(),
    "engine.pace": set(),
    "engine.rounding": set(),
    "engine.speculation": {"engine.prefix", "engine.types"},
    "engine.file_names": set(),
    "engine.grammar_text": set(),
    "engine.heads": {
        "engine.file_names",
        "engine.model_file",
        "engine.tensors",
        "engine.torch_file",
        "engine.wire",
        "errors",
    },
    "engine.tensors": {"engine.torch_file", "errors"},
    "engine.torch_file": set(),
    "models": {
        "models",
        "engine.file_names",
        "engine.heads",
        "engine.model_folder",
        "engine.tensors",
        "engine.torch_file",
        "errors",
    },
    "test_api": set(),
    "bench": {"bench.own_service"},
    "bench.cache": {"bench.own_service", "cache", "cache_disk"},
    "bench.encoders": {
        "bench.own_service",
        "bench.plain_client",
        "engine",
        "models.convert.hf_folder",
        "settings",
        "worker_spec",
    },
    "bench.encoder_runtimes": {
        "bench.compare",
        "bench.encoders",
        "engine",
        "models.convert.gguf_to_folder",
        "settings",
    },
    "bench.compare": {"bench", "settings", "worker_spec"},
    "bench.growth": {
        "bench.own_service",
        "bench.plain_client",
        "bench.scenarios",
        "bench.servers",
        "engine.model_file",
    },
    "bench.uncut_models": {"engine.model_file", "settings"},
    "bench.performance_page": {"bench.growth", "bench.scenarios", "bench.servers"},
    "bench.scenarios": {"bench.http", "bench.plain_client"},
    "bench.api_cost": {"bench.own_service", "bench.plain_client"},
    "bench.busy": {
        "bench.own_service",
        "bench.plain_client",
        "bench.scenarios",
        "bench.servers",
    },
    "bench.start": {
        "bench.own_service",
        "bench.plain_client",
        "bench.scenarios",
        "bench.servers",
    },
    "examples": set(),
    "bench.engine": {"chat", "engine"},
    "bench.speculation": {"engine"},
    "bench.rows": {"bench.engine", "bench.speculation", "bench.uncut_models", "settings"},
    "bench.mlx": {"engine"},
}
# Libraries that only some modules may import.
ONLY_IN = {
    "fastapi": {"api", "server"},
    "starlette": {"api", "server"},
    "uvicorn": {"server", "api.connections"},
    "llama_cpp": {
        "engine.backends.llamacpp",
        "engine.backends.llama_encoder",
        "engine.backends.llama_lanes",
        "engine.backends.llama_memory",
        "engine.backends.llama_model",
        "engine.backends.llama_sampling",
        "engine.backends.llama_threads",
        "engine.backends.llama_tokenizer",
        "bench.encoders",
        "bench.encoder_runtimes",
        "bench.engine",
        "bench.speculation",
    },
    "gguf": {"bench.uncut_models", "models"},
    "mlx": {"engine.backends.mlx", "engine.backends.mlx_bert", "engine.backends.mlx_rows"},
    "onnx": {"engine.backends.onnx_bert", "bench.encoder_runtimes"},
    "huggingface_hub": {"hub"},
}


def imports(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """What a file imports: modules where that is known, else `module.name`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name in MODULES else node.module or ""), node


def fits(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def rule_for(module: str) -> set[str]:
    names = [name for name in MAY_IMPORT if fits(module, {name})]
    assert names, f"{module} has no rule: say in MAY_IMPORT what it may import"
    return MAY_IMPORT[max(names, key=len)]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    allowed = rule_for(module)
    for imported, node in imports(MODULES[module]):
        where = f"{module}, line {node.lineno}, imports {imported}"
        if imported in MODULES:
            assert fits(imported, allowed), where
        library = imported.partition(".")[0]
        assert fits(module, ONLY_IN.get(library, {module})), where


def test_every_rule_is_about_something() -> None:
    for name in MAY_IMPORT.keys() | set().union(*MAY_IMPORT.values()):
        assert name in MODULES or name in PACKAGES, name


def test_the_server_imports_the_fake_backend_only_where_it_uses_it() -> None:
    tree = ast.parse(MODULES["model_source"].read_text(encoding="utf-8"))
    assert not any(
        isinstance(node, ast.ImportFrom) and "backends" in (node.module or "") for node in tree.body
    )


def test_chat_knows_of_the_wire_only_what_a_prompt_consists_of() -> None:
    for module, path in MODULES.items():
        if fits(module, {"chat"}):
            for imported, node in imports(path):
                if imported == "engine.wire":
                    names = {alias.name for alias in getattr(node, "names", [])}
                    known = {"Segment", "Grammar", "GrammarPart", "Thinking", "Calls"}
                    known.add("MAX_GRAMMAR_BYTES")
                    assert names <= known, path


def test_the_smoke_test_needs_only_httpx() -> None:
    libraries = {name.partition(".")[0] for name, _ in imports(MODULES["test_api"])}
    assert libraries - sys.stdlib_module_names == {"httpx"}


# docs/api.md

Fates = dict[str, str]


def fates(path: str) -> Fates:
    """What docs/api.md says of each field of a route."""
    section = read("docs/api.md").split(f"## POST {path}\n")[1].split("\n## ")[0]
    rows = [row for row in table_rows(section) if row[0].startswith("`")]
    return {field: row[1] for row in rows for field in re.findall(r"`(\w+)`", row[0])}


ROUTES = [
    ("/v1/embeddings", EmbeddingRequest, {}, (embedding_create_params.EmbeddingCreateParams,)),
    ("/v1/rerank", RerankRequest, {}, ()),
    ("/v1/chat/completions", ChatRequest, chat.UNSUPPORTED, CHAT_PARAMS),
    ("/v1/completions", CompletionRequest, CONSTRAINTS, COMPLETION_PARAMS),
    ("/v1/responses", ResponsesRequest, responses.UNSUPPORTED, RESPONSE_PARAMS),
    ("/v1/messages", MessagesRequest, messages.UNSUPPORTED, MESSAGE_PARAMS),
    ("/v1/messages/count_tokens", PromptRequest, messages.UNSUPPORTED, [MessageCountTokensParams]),
]


@pytest.mark.parametrize(("path", "request_model", "unsupported", "params"), ROUTES)
def test_every_field_of_the_sdks_requests_has_a_fate(
    path: str, request_model: Any, unsupported: Any, params: Any
) -> None:
    """Fails when a release of an SDK knows a new one."""
    fields = {name for kind in params for name in get_type_hints(kind)}
    assert fields - fates(path).keys() == set()


@pytest.mark.parametrize(("path", "request_model", "unsupported", "params"), ROUTES)
def test_the_fate_of_a_field_is_what_the_code_makes_of_it(
    path: str, request_model: Any, unsupported: Any, params: Any
) -> None:
    """A field that the code does not know is ignored, and the header names it."""
    written = fates(path)
    known = dict.fromkeys(request_model.model_fields, "works")
    known |= dict.fromkeys(unsupported, "refused") | {"user": "ignored"}
    assert {name: fate for name, fate in written.items() if fate != "ignored"} == {
        name: fate for name, fate in known.items() if fate != "ignored"
    }
    assert all(known.get(name, "ignored") == fate for name, fate in written.items())


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table of a section."""
    _, *rows = table_rows(read("docs/api.md").split(f"\n## {heading}\n")[1].split("\n## ")[0])
    return rows


def kinds_of(error: type[ServiceError]) -> Iterator[type[ServiceError]]:
    for kind in error.__subclasses__():
        yield kind
        yield from kinds_of(kind)


def test_the_codes_of_errors_are_all_there_with_their_status() -> None:
    kinds = {kind.code: kind for kind in kinds_of(ServiceError) if kind.code}
    rows = {row[0].strip("`"): row[1:] for row in rows_of("Errors")}
    assert {code: int(row[0]) for code, row in rows.items()} == {
        code: kind.status for code, kind in kinds.items()
    }
    no_use = {code for code, kind in kinds.items() if kind.is_final or 400 <= kind.status < 500}
    assert {code for code, row in rows.items() if row[2] == "no"} == no_use - {
        "body_too_slow", "queue_full",
    }  # fmt: skip


def test_the_headers_of_replies_are_those_that_browsers_may_read() -> None:
    named = [name for row in rows_of("Headers") for name in re.findall(r"`([\w-]+)`", row[0])]
    assert sorted(named) == sorted(EXPOSED_HEADERS)


def test_the_metrics_are_all_there_with_their_labels(tmp_path: Path) -> None:
    with serving(remembering({"cache_dir": str(tmp_path)})) as service:
        service.chat(temperature=0)
        text = service.http.get("/metrics").text
    found: dict[str, set[str]] = {}
    for name in re.findall(r"^# TYPE quintet_(\w+) ", text, re.M):
        (labels, *_) = re.findall(rf"^quintet_{name}(?:_bucket)?(?:{{(.*)}})? ", text, re.M)
        found[name] = {*re.findall(r"(\w+)=", labels)} - {"le"}
    rows = rows_of("Metrics")
    assert {
        name: {*re.findall(r"`(\w+)`", row[1])}
        for row in rows
        for name in re.findall(r"`(\w+)`", row[0])
    } == {name: labels for name, labels in found.items() if not name.endswith("_created")}


def test_the_limits_are_those_of_the_code() -> None:
    limits = {row[0]: [int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", row[1])]
              for row in rows_of("Limits")}  # fmt: skip
    assert [*limits.values()] == [
        [limit]
        for limit in (
            chat_request.MAX_MESSAGES, chat_request.MAX_PARTS, chat_request.MAX_TOOLS,
            chat_request.MAX_NAME, MAX_GRAMMAR_BYTES, sampling.MAX_CHOICES, sampling.MAX_STOPS,
            sampling.MAX_BIASES, sampling.MAX_TOP_LOGPROBS, sampling.MAX_BREAKERS,
            sampling.MAX_BREAKER_BYTES, completions.MAX_PROMPTS, tokens.MAX_LENGTH,
            embeddings.MAX_INPUTS, rerank.MAX_PAIRS,
        )
    ]  # fmt: skip
    assert embeddings.MAX_INPUTS == rerank.MAX_DOCUMENTS
