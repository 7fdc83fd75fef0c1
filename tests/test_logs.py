"""The log says what happened, and nothing that clients said or were told."""

import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import StreamingResponse

from api.middleware import key_of
from logs import Formatter, JsonFormatter
from tests.hub_imitation import hub_imitation
from tests.serving import fake, script, serving, settings, wait_until
from tests.test_server import command, url_in
from tier import Tier

SECRET = "xyzzy-plugh"
KEY = f"{SECRET}-key"
RULES = [
    {"match": "fails", "fault": "step"},
    {"match": "dies", "fault": "crash"},
    {"match": "answer", "answer": f"{SECRET} {{}}"},
]
CHAT, EMBED, RERANK = "/v1/chat/completions", "/v1/embeddings", "/v1/rerank"


def chat(text: str = SECRET, **fields: Any) -> dict[str, Any]:
    return {"model": "light", "messages": [{"role": "user", "content": text}], **fields}


def form(**schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


# path, body, the status that it has
REQUESTS: list[tuple[str, Any, int]] = [
    (CHAT, chat(), 200),
    (CHAT, chat(f"answer {SECRET}"), 200),
    (CHAT, chat(stream=True), 200),
    (CHAT, chat(stop=[SECRET], user=SECRET, metadata={"a": SECRET}, **{SECRET: 1}), 200),
    (CHAT, chat(response_format=form(enum=[SECRET])), 200),
    ("/v1/completions", {"model": "light", "prompt": SECRET}, 200),
    ("/v1/responses", {"model": "light", "input": SECRET}, 200),
    ("/v1/messages", chat(max_tokens=9), 200),
    ("/tokenize", {"content": SECRET}, 200),
    ("/apply-template", chat(), 200),
    (EMBED, {"model": "embedding", "input": [SECRET]}, 200),
    (RERANK, {"query": SECRET, "documents": [SECRET]}, 200),
    # faults of the client
    (CHAT, f'{{"model": "light", "{SECRET}', 400),
    (CHAT, f"{SECRET}", 400),
    (CHAT, SECRET.encode("utf-16"), 400),
    (CHAT, chat(temperature=SECRET), 400),
    (CHAT, chat(tools=SECRET), 400),
    (CHAT, chat(tool_choice=SECRET), 400),
    (CHAT, {"model": "light", "messages": [{"role": SECRET, "content": SECRET}]}, 400),
    (CHAT, {"model": "light", "messages": SECRET}, 400),
    (CHAT, chat(response_format=form(type=SECRET)), 400),
    (CHAT, chat(response_format=form(**{"$ref": SECRET})), 400),
    (CHAT, chat(grammar=f"start: {SECRET} ( %"), 400),
    (CHAT, chat(f"\ud800 {SECRET}"), 400),
    (CHAT, chat(SECRET * 9000), 400),
    (CHAT, chat(model=SECRET), 404),
    (EMBED, {"model": "embedding", "input": {"a": SECRET}}, 400),
    (EMBED, {"model": "embedding", "input": SECRET, "dimensions": SECRET}, 400),
    (RERANK, {"query": {"a": SECRET}, "documents": [SECRET]}, 400),
    (RERANK, {"query": SECRET, "documents": [[SECRET]]}, 400),
    # faults of the model
    (CHAT, chat(f"fails {SECRET}"), 500),
    (EMBED, {"model": "embedding", "input": [f"fails {SECRET}"]}, 500),
]


def ask(http: httpx.Client, path: str, body: Any) -> int:
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    return http.post(path, content=content, headers=headers).status_code


def ask_everything(http: httpx.Client) -> None:
    for path, body, expected in REQUESTS:
        assert ask(http, path, body) == expected, (path, body)
    for headers in ({"x-api-key": f"{SECRET}-wrong"}, {"Authorization": f"Basic {SECRET}"}):
        assert http.get(f"/v1/models?key={SECRET}", headers=headers).status_code == 401


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that is logged at INFO, as the service writes it."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(Formatter("%(levelname)s %(name)s: %(message)s"))
    handler.addFilter(lambda record: record.name != "httpx")  # the client's own
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel("INFO")
    yield text
    root.removeHandler(handler)
    root.setLevel(level)


def test_nothing_that_was_said_is_logged(
    log: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    path = script(tmp_path, *RULES)
    tiers = {"light": fake(path, n_ctx=2048), "embedding": fake(path)}
    with serving(settings({"api_keys": [KEY], "admin_api_keys": [KEY]}, **tiers)) as service:
        ask_everything(service.http)

        def fail(self: Tier, request: Any, **_: object) -> None:
            raise KeyError(f"{SECRET} {request}")  # libraries write such messages

        monkeypatch.setattr(Tier, "submit", fail)
        assert ask(service.http, CHAT, chat()) == 500
    text = log.getvalue()
    assert text.count("POST /v1/chat/completions 200") == 5
    assert "A step failed" in text
    assert "in fail\n" in text
    assert "KeyError: LOG_LEVEL=DEBUG shows the message" in text
    assert SECRET not in text
    assert SECRET not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "arguments", [["server.py"], ["-m", "uvicorn", "server:app", "--port", "0"]]
)
def test_nothing_that_was_said_is_printed(tmp_path: Path, arguments: list[str]) -> None:
    path = script(tmp_path, *RULES)
    environment = {"LIGHT_MODEL_PATH": path, "LIGHT_N_CTX": "2048", "API_KEYS": KEY,
                   "EMBEDDING_BACKEND": "fake", "EMBEDDING_MODEL_PATH": path}  # fmt: skip
    with command(*arguments, **environment) as process:
        url = url_in(process, r"(?:serves|running on) (http://[\d.:]+)")
        rest: list[str] = []
        reader = threading.Thread(target=lambda: rest.append(read(process)))
        reader.start()
        with httpx.Client(base_url=url, timeout=30) as http:
            ask_everything(http)
            assert ask(http, CHAT, chat(f"dies {SECRET}")) == 500
        process.terminate()
        reader.join(20)
    (text,) = rest
    assert text.count("POST /v1/chat/completions 200") >= 5
    assert "its worker died" in text
    assert "RuntimeError: LOG_LEVEL=DEBUG shows the message" in text, "a step's, in the worker"
    assert SECRET not in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["server.py"],
        "-m uvicorn server:app --port 0 --http api.connections:Connection".split(),
    ],
)
def test_as_json_every_line_is_an_object_and_a_request_has_its_fields(
    tmp_path: Path, arguments: list[str]
) -> None:
    path = script(tmp_path, *RULES)
    environment = {"LIGHT_MODEL_PATH": path, "API_KEYS": KEY, "LOG_FORMAT": "json",
                   "LIGHT_COLOUR": "red"}  # fmt: skip
    with command(*arguments, **environment) as process:
        found: list[dict[str, Any]] = []
        assert process.stdout
        for line in process.stdout:
            if arguments == ["server.py"] or found or line.startswith("{"):
                found.append(json.loads(line))  # uvicorn says something before it loads us
            if "Serving" in line or "running on" in line:
                break
        last = found[-1]
        port = last.get("port") or last["message"].partition("127.0.0.1:")[2].partition(" ")[0]
        reader = threading.Thread(
            target=lambda: found.extend(map(json.loads, read(process).splitlines()))
        )
        reader.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            assert ask(http, CHAT, chat()) == 200
            assert http.get("/v1/models").status_code == 401
            assert ask(http, CHAT, chat(f"fails {SECRET}")) == 500
            assert ask(http, CHAT, chat(f"dies {SECRET}")) == 500
        process.terminate()
        reader.join(20)
    assert SECRET not in json.dumps(found)
    assert all({"time", "level", "logger", "message", "process"} <= line.keys() for line in found)
    asked, stranger, *_ = (line for line in found if line["logger"] == "quintet.access")
    assert asked["request_id"].startswith("req-")
    assert asked["duration_ms"] >= asked["queue_ms"] + asked["prompt_ms"] + asked["generation_ms"]
    told = {name: asked[name] for name in ("method", "route", "tier", "status", "key_id")}
    key_id = key_of(KEY, is_admin=False).id
    assert list(told.values()) == ["POST", CHAT, "light", 200, key_id]
    assert (stranger["status"], stranger["key_id"], stranger["tier"]) == (401, None, None)
    assert any("LIGHT_COLOUR" in line["message"] for line in found), "also what came before"
    (failed,) = (line for line in found if "A step failed" in line["message"])
    assert "RuntimeError: LOG_LEVEL=DEBUG" in failed["exception"], "the worker's too"
    assert failed["process"] != asked["process"]


def read(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.read()


def lines(error: BaseException, level: str = "INFO") -> str:
    logger = logging.getLogger("test_logs")
    logger.setLevel(level)
    record = logger.makeRecord(
        logger.name, logging.ERROR, "", 0, "It failed", (), (type(error), error, None)
    )
    return Formatter("%(message)s").format(record)


def test_at_debug_a_faults_message_is_there() -> None:
    assert lines(KeyError(SECRET), "DEBUG").endswith(f"KeyError: '{SECRET}'")
    assert lines(KeyError(SECRET)).endswith("KeyError: LOG_LEVEL=DEBUG shows the message")


def test_what_led_to_a_fault_is_told_first_without_its_message_too() -> None:
    try:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise RuntimeError(SECRET) from error
    except RuntimeError as error:
        text = lines(error)
    assert SECRET not in text
    assert text.index("ValueError") < text.index("which led to this") < text.index("RuntimeError")
    assert "raise ValueError(SECRET)" in text, "where it was raised"


def test_a_record_as_json_has_its_fields_and_no_message_of_a_fault() -> None:
    record = logging.makeLogRecord(
        {"name": "test_logs.x", "levelname": "ERROR", "msg": "It\n%s", "args": ("failed",),
         "exc_info": (KeyError, KeyError(SECRET), None), "fields": {"n": 1, "at": Path("/x")}}
    )  # fmt: skip
    line = JsonFormatter().format(record)
    assert "\n" not in line
    said = json.loads(line)
    assert (said["level"], said["message"], said["n"], said["at"]) == (
        "ERROR",
        "It\nfailed",
        1,
        "/x",
    )
    assert said["exception"].endswith("KeyError: LOG_LEVEL=DEBUG shows the message")


def test_of_a_file_that_is_not_there_the_name_is_told() -> None:
    with pytest.raises(OSError, match="nowhere") as caught:
        Path("/nowhere/at/all").read_bytes()
    assert "/nowhere/at/all" in lines(caught.value)


def test_another_handler_may_tell_more() -> None:
    record = logging.makeLogRecord(
        {"name": "test_logs.x", "exc_info": (KeyError, KeyError(SECRET), None)}
    )
    assert SECRET not in Formatter().format(record)
    assert SECRET in logging.Formatter().format(record)


def test_a_fault_in_the_midst_of_a_reply_is_not_quoted_by_uvicorn_either(
    log: io.StringIO, caplog: pytest.LogCaptureFixture
) -> None:
    """Its loggers have a formatter of their own where it is told to serve `server:app`."""

    def halves() -> Iterator[str]:
        yield "half"
        raise KeyError(SECRET)

    with serving() as service:
        service.app.get("/half")(lambda: StreamingResponse(halves()))
        with pytest.raises(httpx.RemoteProtocolError):
            service.http.get("/half")
        wait_until(lambda: "Exception in ASGI" in caplog.text)
    plain = logging.Formatter()
    said = [plain.format(r) for r in caplog.records if r.name.startswith("uvicorn")]
    assert "ReplyCutShort" in "".join(said)
    assert SECRET not in "".join(said)
    assert "KeyError: LOG_LEVEL=DEBUG" in log.getvalue(), "it is in our log, and only there"


def test_a_forwarded_address_cannot_forge_a_line(log: io.StringIO) -> None:
    with serving() as service:
        for given in (
            "1.2.3.4",
            "1.2.3.4 GET /admin 200",
            "fe80::1%x GET /admin 200",
            "\x85FORGED",
        ):
            headers = {"X-Forwarded-For": given.encode("latin-1")}
            assert service.http.get("/health", headers=headers).status_code == 200
        wait_until(lambda: log.getvalue().count("quintet.access") == 4)
    text = log.getvalue()
    assert "quintet.access: 1.2.3.4 GET /health 200" in text
    assert "admin" not in text
    assert "FORGED" not in text


def test_no_address_of_a_download_is_in_the_log() -> None:
    """Those of the hub's storage are signed: whoever has one has the file."""
    code = (
        "import sys, httpx, httpx2, server, settings\n"
        "server.configure_logging(settings.ServerSettings(_env_file=None))\n"
        "httpx.get(sys.argv[1], trust_env=False), httpx2.get(sys.argv[1], trust_env=False)\n"
    )
    with hub_imitation() as hub:
        call = [sys.executable, "-c", code, f"{hub.endpoint}/?Signature={SECRET}"]
        done = subprocess.run(call, stderr=subprocess.PIPE, text=True, timeout=60, check=True)
        assert len(hub.requests) == 2
    assert done.stderr == ""
