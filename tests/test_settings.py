"""Settings: what is read, what is refused, and what a user is told about it."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from settings import (
    CHAT_TIERS,
    DEFAULT_CHAT_MODEL,
    DEFAULT_EMBEDDING_MODEL,
    ROOT,
    TIERS,
    ServerSettings,
    Settings,
    SettingsError,
    TierSettings,
    known_keys,
    unknown_keys,
)

Load = Callable[[str], Settings]
EnvFile = Callable[[str], Path]

# the block of the design that this project was asked for with
DESIGN_BLOCK = """
EMBEDDING_MODEL_PATH=/path/to/bge-m3-Q8_0.gguf
EMBEDDING_BACKEND=llamacpp
EMBEDDING_EMBEDDING_MODE=true
EMBEDDING_EMBEDDING_DIMENSION=1024
EMBEDDING_N_CTX=8192
RERANKER_MODEL_PATH=/path/to/bge-reranker-v2-m3-Q8_0.gguf
RERANKER_BACKEND=llamacpp
RERANKER_N_CTX=512
RERANKER_TEMPERATURE=0.01
"""


@pytest.fixture(autouse=True)
def no_unknown_keys_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known ones are taken away for all tests (conftest.py)."""
    for key, _ in unknown_keys(None):
        monkeypatch.delenv(key)


@pytest.fixture
def env_file(tmp_path: Path) -> EnvFile:
    def write(text: str) -> Path:
        path = tmp_path / ".env"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def load(env_file: EnvFile) -> Load:
    return lambda text: Settings.load(env_file(text))


def faults(load: Load, text: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(text)
    return str(caught.value).splitlines()


def values_of(settings: ServerSettings | TierSettings, **expected: Any) -> Mapping[str, Any]:
    return {name: getattr(settings, name) for name in expected}


# defaults


def test_without_any_configuration_the_tiers_run_the_default_models(load: Load) -> None:
    tiers = load("").tiers
    assert tuple(tiers) == (*CHAT_TIERS, "embedding")
    assert {tiers[name].path for name in CHAT_TIERS} == {ROOT / DEFAULT_CHAT_MODEL}
    assert tiers["embedding"].path == ROOT / DEFAULT_EMBEDDING_MODEL
    assert tiers["embedding"].query_prefix == "query: "
    assert {tier.backend for tier in tiers.values()} == {"llamacpp"}


def test_a_missing_file_is_as_good_as_an_empty_one(load: Load, tmp_path: Path) -> None:
    assert Settings.load(tmp_path / "nowhere") == Settings.load(None) == load("")


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    for encoding in ("utf-16", "latin-1"):
        path.write_text("# Schlüssel\nPORT=8001\n", encoding=encoding)
        with pytest.raises(SettingsError, match=r"\.env: it is not in UTF-8"):
            Settings.load(path)


def test_a_file_that_cannot_be_read_is_named(
    env_file: EnvFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("settings.dotenv_values", refuse)
    with pytest.raises(SettingsError, match=r"\.env: it cannot be read: Permission denied"):
        Settings.load(env_file("PORT=8001\n"))


@pytest.mark.parametrize(
    ("limit", "hint"),
    [("0.8", ", such as 80%"), ("80", ", such as 80%"), ("2K", ""), ("300", ""), ("1023 KB", "")],
)
def test_a_limit_in_which_nothing_fits_was_meant_otherwise(
    load: Load, limit: str, hint: str
) -> None:
    (fault,) = faults(load, f"MEMORY_LIMIT={limit}")
    assert fault.startswith(
        f"MEMORY_LIMIT: that is less than a megabyte; a share ends in %{hint} (it is"
    )


@pytest.mark.parametrize("limit", ["12iB", "12 i", "much", "-1G"])
def test_a_limit_that_is_no_size_is_told_what_one_is(load: Load, limit: str) -> None:
    (fault,) = faults(load, f"MEMORY_LIMIT={limit}")
    assert "give a share such as 80%, or a size such as 12G" in fault


def test_the_defaults_are_those_that_the_design_promises(load: Load) -> None:
    settings = load("")
    server: dict[str, Any] = {"host": "127.0.0.1", "port": 8000, "api_keys": [], "cors_origins": []}
    assert values_of(settings.server, **server) == server
    tier: dict[str, Any] = {
        "n_ctx": None, "n_parallel": 8, "kv_tokens": None, "n_batch": 512, "n_threads": None,
        "n_gpu_layers": -1, "max_tokens": None, "queue_size": 64, "idle_ttl_s": 600,
        "pin": False, "preload": False,
    }  # fmt: skip
    assert values_of(settings.tiers["light"], **tier) == tier


def test_settings_of_an_unconfigured_tier_hold_for_its_default_model(load: Load) -> None:
    tiers = load("LIGHT_N_CTX=1024\nHEAVY_TEMPERATURE=0").tiers
    assert tiers["light"].n_ctx == 1024
    assert tiers["heavy"].temperature == 0
    assert tiers["light"].path == ROOT / DEFAULT_CHAT_MODEL


# what is read


def test_each_tier_reads_its_own_prefix_only(load: Load) -> None:
    text = "\n".join(
        f"{tier.upper()}_MODEL_PATH=/models/{tier}.gguf\n{tier.upper()}_N_CTX={100 + n}"
        for n, tier in enumerate(TIERS)
    )
    tiers = load(text).tiers
    assert tuple(tiers) == TIERS
    for n, name in enumerate(TIERS):
        assert tiers[name].path == Path(f"/models/{name}.gguf")
        assert tiers[name].n_ctx == 100 + n


def test_only_configured_tiers_exist(load: Load) -> None:
    assert list(load("MEDIUM_MODEL_PATH=a.gguf\nLIGHT_N_CTX=512").tiers) == ["medium"]


def test_a_model_directory_is_mlxs_unless_another_backend_is_named(
    load: Load, tmp_path: Path
) -> None:
    folder = tmp_path / "a model"
    folder.mkdir()
    backend = f"LIGHT_MODEL_PATH={folder}\n"
    assert load(backend).tiers["light"].backend == "llamacpp", "it is empty"
    (folder / "config.json").touch()
    (folder / "model.safetensors").touch()
    assert load(backend).tiers["light"].backend == "mlx"
    assert load(f"{backend}LIGHT_BACKEND=\n").tiers["light"].backend == "mlx"
    assert load(f"{backend}LIGHT_BACKEND=flag\n").tiers["light"].backend == "flag"


def test_the_fake_backend_needs_no_model_to_configure_a_tier(load: Load) -> None:
    assert list(load("HEAVY_BACKEND=fake").tiers) == ["heavy"]


def test_the_example_of_the_design_loads(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    tiers = load(DESIGN_BLOCK).tiers
    assert list(tiers) == ["embedding", "reranker"]
    embedding: dict[str, Any] = {
        "model_path": "/path/to/bge-m3-Q8_0.gguf", "embedding_mode": True,
        "embedding_dimension": 1024, "n_ctx": 8192,
    }  # fmt: skip
    assert values_of(tiers["embedding"], **embedding) == embedding
    assert (tiers["reranker"].n_ctx, tiers["reranker"].temperature) == (512, 0.01)
    (warning,) = caplog.records
    assert "RERANKER_TEMPERATURE does nothing" in warning.getMessage()


def test_the_environment_wins_over_the_file(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "9000")
    monkeypatch.setenv("LIGHT_N_CTX", "4096")
    settings = load("PORT=8080\nLIGHT_N_CTX=1024\nLIGHT_N_BATCH=256")
    assert settings.server.port == 9000
    assert settings.tiers["light"].n_ctx == 4096
    assert settings.tiers["light"].n_batch == 256


def test_an_empty_value_is_not_set(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load("".join(f"{key}=\n" for key in known_keys())) == load("")
    monkeypatch.setenv("PORT", "")
    assert load("PORT=8080").server.port == 8080


def test_keys_may_be_written_small(load: Load) -> None:
    assert load("port=8080\nlight_n_ctx=512").server.port == 8080


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ("one", ["one"]),
        ("one,two", ["one", "two"]),
        (" one , two ", ["one", "two"]),
        ("one,,two,", ["one", "two"]),
        ("','", []),
        ("' '", []),
    ],
)
def test_lists_are_comma_separated(load: Load, value: str, items: list[str]) -> None:
    settings = load(
        "".join(f"{key}={value}\n" for key in ("API_KEYS", "ALLOWED_HOSTS", "LIGHT_ALIASES"))
    )
    assert [key.get_secret_value() for key in settings.server.api_keys] == items
    assert settings.server.allowed_hosts == items
    assert settings.tiers["light"].aliases == items


def test_a_relative_path_starts_at_the_project(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    tiers = load(
        "LIGHT_MODEL_PATH=models/a.gguf\nMEDIUM_MODEL_PATH=/b.gguf\nHEAVY_MODEL_PATH=~/c.gguf"
    ).tiers
    assert tiers["light"].path == ROOT / "models" / "a.gguf"
    assert tiers["medium"].path == Path("/b.gguf")
    assert tiers["heavy"].path == Path("/home/someone/c.gguf")


# what is refused


def test_all_faults_are_reported_at_once_with_their_keys(load: Load) -> None:
    lines = faults(
        load, "PORT=eighty\nLIGHT_N_CTX=many\nHEAVY_TEMPERATURE=9\nRERANKER_BACKEND=vllm\nPORTT=1"
    )
    assert [line.partition(":")[0] for line in lines] == [
        "PORT",
        "LIGHT_N_CTX",
        "HEAVY_TEMPERATURE",
        "RERANKER_BACKEND",
    ]
    assert "'eighty'" in lines[0]
    assert "'llamacpp', 'mlx', 'onnx', 'flag' or 'fake'" in lines[3]


@pytest.mark.parametrize(
    "line",
    [
        "PORT=65536",
        "LOG_LEVEL=LOUD",
        "MAX_BODY_BYTES=0",
        "WATCHDOG_S=0",
        "ALLOW_INSECURE=perhaps",
        "LIGHT_N_CTX=0",
        "LIGHT_N_PARALLEL=0",
        "LIGHT_N_THREADS=0",
        "LIGHT_TEMPERATURE=-0.1",
        "LIGHT_TEMPERATURE=nan",
        "LIGHT_TOP_P=1.5",
        "LIGHT_REPEAT_PENALTY=0",
        "LIGHT_MAX_TOKENS=0",
        "LIGHT_QUEUE_SIZE=0",
        "LIGHT_IDLE_TTL_S=-1",
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(load: Load, line: str) -> None:
    key, _, value = line.partition("=")
    (fault,) = faults(load, line)
    assert fault.startswith(f"{key}: ")
    assert f"(it is '{value}')" in fault


@pytest.mark.parametrize(
    "key", ["LIGHT_MODEL_PATH", "EMBEDDING_SPARSE_HEAD_PATH", "CACHE_DIR", "API_KEYS_FILE"]
)
def test_a_home_of_nobody_is_refused(load: Load, key: str) -> None:
    (fault,) = faults(load, f"{key}=~nosuch/x")
    assert fault.startswith(f"{key}: the ~ is of no user that this machine knows")


def test_a_batch_that_cannot_hold_a_token_of_each_sequence_is_refused(load: Load) -> None:
    (fault,) = faults(load, "LIGHT_N_BATCH=4\nLIGHT_N_PARALLEL=8")
    assert fault == "LIGHT: N_BATCH (4) must not be less than N_PARALLEL (8)"
    assert load("LIGHT_N_BATCH=8\nLIGHT_N_PARALLEL=8").tiers["light"].n_batch == 8


def test_fewer_cells_than_one_request_may_use_are_refused(load: Load) -> None:
    (fault,) = faults(load, "HEAVY_KV_TOKENS=1000\nHEAVY_N_CTX=2000")
    assert fault == "HEAVY: KV_TOKENS (1000) must not be less than N_CTX (2000)"
    assert load("HEAVY_KV_TOKENS=2000\nHEAVY_N_CTX=2000").tiers["heavy"].kv_tokens == 2000


def test_a_name_that_means_two_tiers_is_refused(load: Load) -> None:
    of = "LIGHT_BACKEND=fake\nHEAVY_BACKEND=fake\nEMBEDDING_BACKEND=fake\n"
    aliases = "LIGHT_ALIASES=gpt,heavy,light\nHEAVY_ALIASES=big,gpt\n"
    assert faults(load, f"{of}{aliases}EMBEDDING_ALIASES=reranker\nRERANKER_ALIASES=big") == [
        "LIGHT_ALIASES: heavy is the name of another tier",
        "HEAVY_ALIASES: gpt is in LIGHT_ALIASES too",
        "EMBEDDING_ALIASES: reranker is the name of another tier",
        "RERANKER_ALIASES: big is in HEAVY_ALIASES too",
    ]
    one = load("LIGHT_BACKEND=fake\nLIGHT_ALIASES=medium,heavy\nHEAVY_ALIASES=medium")
    assert one.tiers["light"].aliases == ["medium", "heavy"], "there are no such tiers"


@pytest.mark.parametrize(
    ("origin", "hint"),
    [
        ("https://app.example/", "write https://app.example ("),
        ("https://App.example/a?b", "write https://app.example ("),
        ("https://app.example:443", "write https://app.example ("),
        ("http://app.example:80", "write http://app.example ("),
        ("app.example/", "write https://app.example ("),
        ("*.app.example", "there are no patterns"),
        ("https://*.app.example", "there are no patterns"),
        ("https://ü.example", "write it in ASCII"),
    ],
)
def test_an_origin_that_no_browser_has_is_refused(load: Load, origin: str, hint: str) -> None:
    (fault,) = faults(load, f"CORS_ORIGINS=https://good.example,{origin}")
    assert fault.startswith(f"CORS_ORIGINS: {origin}: ")
    assert hint in fault


@pytest.mark.parametrize(
    ("host", "hint"),
    [
        ("box.lan:8000", "write box.lan ("),
        ("http://box.lan/", "write box.lan ("),
        ("*.box.lan", "there are no patterns"),
        (".box.lan", "there are no patterns"),
    ],
)
def test_a_host_that_no_header_has_is_refused(load: Load, host: str, hint: str) -> None:
    (fault,) = faults(load, f"ALLOWED_HOSTS=good.lan,{host}")
    assert fault.startswith(f"ALLOWED_HOSTS: {host}: ")
    assert hint in fault


def test_origins_and_hosts_that_there_are_are_taken(load: Load) -> None:
    origins = "https://app.example,http://10.0.0.1:3000,http://[::1]:3000,tauri://localhost,null,*"
    hosts = "Box.lan,host.docker.internal,box_1,10.0.0.1,::1,[::1],*"
    server = load(f"CORS_ORIGINS={origins}\nALLOWED_HOSTS={hosts}").server
    assert (server.cors_origins, server.allowed_hosts) == (origins.split(","), hosts.split(","))


# keys

SECRET = "sk-very-secret"


def api_keys(settings: Settings) -> list[str]:
    return [key.get_secret_value() for key in settings.server.keys]


def test_keys_come_from_a_file_too(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("\ufeff# of the team\nfirst\r\n\n  second  \n\t# third\n#fourth", "utf-8")
    path.chmod(0o600)
    settings = load(f"API_KEYS=zeroth\nAPI_KEYS_FILE={path}\nADMIN_API_KEYS=boss,second")
    assert api_keys(settings) == ["zeroth", "first", "second", "boss", "second"]
    assert caplog.records == []


@pytest.mark.skipif(os.name != "posix", reason="there are no such modes")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o601, 0o602])
def test_a_file_of_keys_that_others_may_open_is_warned_of(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    path = tmp_path / "keys"
    path.write_text(SECRET)
    path.chmod(mode)
    assert api_keys(load(f"API_KEYS_FILE={path}")) == [SECRET]
    (warning,) = caplog.records
    assert warning.getMessage().startswith("API_KEYS_FILE: others may open the file")
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "the file cannot be read: No such file"),
        ("", "there is no key in the file"),
        ("\n# none\n  \n", "there is no key in the file"),
        (f"good\n{SECRET} # bob", "key 2 must be of printable ASCII characters without spaces"),
        (f"{SECRET}ü", "key 1 must be of printable ASCII"),
        (f"{SECRET}\0", "key 1 must be of printable ASCII"),
        (b"\xff\xfe" + SECRET.encode("utf-16-le"), "key 1 must be of printable ASCII"),
    ],
)
def test_a_file_of_keys_that_cannot_be_used_is_named(
    load: Load, tmp_path: Path, content: str | bytes | None, reason: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(0o600)
    (fault,) = faults(load, f"API_KEYS_FILE={path}")
    assert fault.startswith(f"API_KEYS_FILE: {reason}")
    assert SECRET not in fault


def test_a_directory_is_no_file_of_keys(load: Load, tmp_path: Path) -> None:
    (fault,) = faults(load, f"API_KEYS_FILE={tmp_path}")
    assert fault.startswith("API_KEYS_FILE: the file cannot be read: ")


@pytest.mark.parametrize(
    "line",
    [
        f"API_KEYS=fine,{SECRET} x",
        f"API_KEYS={SECRET}ü",
        f"ADMIN_API_KEYS={SECRET}ü",
        f"API_KEYS_FILE={SECRET}",  # the key where the file's name should be
    ],
)
def test_a_fault_in_a_key_does_not_quote_it(load: Load, line: str) -> None:
    (fault,) = faults(load, line)
    assert fault.startswith(line.partition("=")[0] + ": ")
    assert SECRET not in fault
    with pytest.raises(ValidationError) as caught:
        ServerSettings(api_keys=[SECRET + "ü"])
    assert SECRET not in str(caught.value)


def test_settings_do_not_show_their_keys(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{SECRET}-1")
    path.chmod(0o600)
    settings = load(f"API_KEYS={SECRET}-2\nAPI_KEYS_FILE={path}\nADMIN_API_KEYS={SECRET}-3")
    assert len(api_keys(settings)) == 3
    shown = [settings, settings.server, settings.server.keys, settings.server.model_dump()]
    for text in [*map(str, shown), *map(repr, shown), settings.server.model_dump_json()]:
        assert SECRET not in text


def test_a_key_that_slipped_to_the_next_line_is_not_logged(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        load(f"API_KEYS=one,\n{SECRET}\nAPI_KEY={SECRET}")
    slipped, misspelt = (record.getMessage() for record in caplog.records)
    assert slipped.startswith("A line of ")
    assert slipped.endswith(" without `=` does nothing")
    assert misspelt.startswith("The setting API_KEY is not known")
    assert SECRET not in caplog.text


# what is warned of


def test_an_unknown_key_is_warned_of_with_the_nearest_one(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "settings"):
        settings = load("LIGHT_MODLE_PATH=a.gguf\nFRUIT=apple")
    nearest, unlike = (record.getMessage() for record in caplog.records)
    assert nearest.startswith("The setting LIGHT_MODLE_PATH is not known")
    assert nearest.endswith("did you mean LIGHT_MODEL_PATH?")
    assert unlike == "The setting FRUIT is not known and does nothing"
    assert tuple(settings.tiers) == (*CHAT_TIERS, "embedding")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("API_KEY", "API_KEYS"),
        ("ADMIN_API_KEY", "ADMIN_API_KEYS"),
        ("api_key_file", "API_KEYS_FILE"),
        ("MAX_CONNECTION", "MAX_CONNECTIONS"),
        ("ALLOWED_HOST", "ALLOWED_HOSTS"),
        ("REQUEST_TIMEOUT", "REQUEST_TIMEOUT_S"),
    ],
)
def test_of_the_environment_what_is_nearly_a_key_is_warned_of(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    key: str,
    nearest: str,
) -> None:
    monkeypatch.setenv(key, SECRET)
    load("")
    (warning,) = caplog.messages
    assert warning == f"The setting {key} is not known and does nothing; did you mean {nearest}?"


ORDINARY = """
PATH HOME HOSTNAME PORT_RANGE HTTP_PORT DB_HOST GHOST SERVER_PORT LANG LC_ALL SHELL TERM USER
LOGNAME MAIL PWD SHLVL OPENAI_API_KEY ANTHROPIC_API_KEY GEMINI_API_KEY VLLM_API_KEY HF_XET_CACHE
HF_DATASETS_CACHE HF_ASSETS_CACHE HF_TOKEN_PATH HUGGINGFACE_HUB_CACHE HF_HUB_DISABLE_TELEMETRY
HF_HUB_ETAG_TIMEOUT TRANSFORMERS_OFFLINE XDG_CACHE_HOME PIP_CACHE_DIR UV_CACHE_DIR CCACHE_DIR
WATCHDOG_USEC WATCHDOG_PID DOCKER_HOST SSH_AUTH_SOCK NOTIFY_SOCKET VIRTUAL_ENV CUDA_VISIBLE_DEVICES
"""


def test_ordinary_variables_of_a_shell_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ORDINARY.split():
        monkeypatch.setenv(key, "1")
    assert unknown_keys(None) == []


@pytest.mark.parametrize(
    ("tier", "idle", "used", "reason"),
    [
        (
            "EMBEDDING",
            "N_PARALLEL=2 N_BATCH=64 MAX_STALL_MS=50 PREFIX_CACHE_MB=1 TOP_K=3 KV_TOKENS=64",
            "POOLING=cls BATCH_TOKENS=64 N_THREADS=1 SPARSE_HEAD_PATH=a",
            "no text is generated there",
        ),
        (
            "RERANKER",
            "QUEUE_SIZE=3",
            "QUEUE_TEXTS=9 N_THREADS=1",
            "texts are counted there, by QUEUE_TEXTS",
        ),
        (
            "LIGHT",
            "N_THREADS=1 FLASH_ATTENTION=false",
            "BACKEND=mlx SPECULATION=false KV_TOKENS=64 N_CTX=64 N_GPU_LAYERS=0 QUEUE_SIZE=3",
            "the backend mlx has no use for it",
        ),
        (
            "EMBEDDING",
            "N_GPU_LAYERS=0",
            "BACKEND=onnx N_THREADS=1 BATCH_TOKENS=9",
            "the backend onnx has no use for it",
        ),
        (
            "EMBEDDING",
            "SPECULATION=false",
            "BACKEND=mlx N_GPU_LAYERS=0",
            "no text is generated there",
        ),
        (
            "HEAVY",
            "POOLING=cls QUERY_PREFIX=a PASSAGE_PREFIX=b QUEUE_TEXTS=9 BATCH_TOKENS=9 "
            "INPUT_TYPE=query SPARSE_HEAD_PATH=a COLBERT_HEAD_PATH=a TOKEN_IDS=own MATRYOSHKA=true "
            "EMBEDDING_MODE=true EMBEDDING_DIMENSION=9 TRUNCATE=end",
            "N_PARALLEL=2 N_BATCH=64 MAX_STALL_MS=50 PREFIX_CACHE_MB=1 TOP_K=3",
            "nothing is embedded or scored there",
        ),
        (
            "RERANKER",
            "POOLING=cls INPUT_TYPE=query EMBEDDING_DIMENSION=9 SPARSE_HEAD_PATH=a "
            "COLBERT_HEAD_PATH=a",
            "BATCH_TOKENS=9 QUEUE_TEXTS=9 TRUNCATE=end",
            "nothing is embedded there",
        ),
    ],
)
def test_what_does_nothing_in_a_tier_is_warned_of(
    load: Load, caplog: pytest.LogCaptureFixture, tier: str, idle: str, used: str, reason: str
) -> None:
    given = ["MODEL_PATH=a", "BACKEND=fake", *idle.split(), *used.split()]
    load("\n".join(f"{tier}_{line}" for line in given))
    keys = sorted(line.partition("=")[0] for line in idle.split())
    assert caplog.messages == [f"The setting {tier}_{key} does nothing: {reason}" for key in keys]


def test_settings_of_a_tier_that_there_is_not_are_warned_of(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    load("LIGHT_BACKEND=fake\nHEAVY_N_CTX=64\nHEAVY_PRELOAD=true\nEMBEDDING_N_CTX=64")
    assert caplog.messages == [
        "HEAVY_N_CTX, HEAVY_PRELOAD: without HEAVY_MODEL_PATH there is no such tier, so that does "
        "nothing",
        "EMBEDDING_N_CTX: without EMBEDDING_MODEL_PATH there is no such tier, so that does nothing",
    ]
    caplog.clear()
    load("HEAVY_N_CTX=64\nEMBEDDING_N_CTX=64\nRERANKER_ALIASES=judge")
    assert caplog.messages == [], "of the default models"
    load("EMBEDDING_BACKEND=fake\nRERANKER_ALIASES=judge\nRERANKER_N_CTX=64")
    (warning,) = caplog.messages
    assert warning.startswith("RERANKER_N_CTX: without RERANKER_MODEL_PATH")


def test_of_the_environment_a_tiers_prefix_is_ours(
    monkeypatch: pytest.MonkeyPatch, env_file: EnvFile
) -> None:
    monkeypatch.setenv("HEAVY_N_CTXX", "1")
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    assert unknown_keys(env_file("HEAVY_N_CTXX=2\n")) == [("HEAVY_N_CTXX", "HEAVY_N_CTX")]


def test_known_keys_are_all_known(env_file: EnvFile) -> None:
    keys = known_keys()
    assert len(keys) == len(set(keys))
    assert unknown_keys(env_file("".join(f"{key}=\n" for key in keys))) == []
