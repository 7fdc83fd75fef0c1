"""All settings, from the environment and `.env`: one class for the server, one for each tier.

Read once, at start. `.env.example` lists every key; a key that nobody knows is warned of.
"""

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from dotenv import dotenv_values
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=BaseSettings)

ROOT = Path(__file__).resolve().parent
DEFAULT_CHAT_MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"  # setup.sh puts both there
DEFAULT_EMBEDDING_MODEL = "models/multilingual-e5-small-F32.gguf"

ReasoningField = Literal["reasoning_content", "reasoning", "both", "none"]
TierName = Literal["light", "medium", "heavy", "embedding", "reranker"]
CHAT_TIERS: tuple[TierName, ...] = ("light", "medium", "heavy")
ENCODER_TIERS: tuple[TierName, ...] = ("embedding", "reranker")
TIERS: tuple[TierName, ...] = (*CHAT_TIERS, *ENCODER_TIERS)
# of a tier that generates text
GENERATING = {
    "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens", "tool_format",
}  # fmt: skip
# one pattern for localhost on any port, as browsers write origins
LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


def _split(value: Any) -> Any:
    """Items of a comma-separated text. Nothing between commas is no item: it would be a key that
    everybody has."""
    if not isinstance(value, str):
        return value
    return [item for part in value.split(",") if (item := part.strip())]


CommaSeparated = Annotated[list[str], NoDecode, BeforeValidator(_split)]


class SettingsError(Exception):
    """The configuration cannot be used; the message says which keys and why, a line each."""


class TierSettings(BaseSettings):
    """One tier, its keys without their prefix. None: decided from the model and the machine."""

    model_config = SettingsConfigDict(
        extra="ignore", env_ignore_empty=True, protected_namespaces=(), frozen=True
    )

    model_path: str = ""
    backend: Literal["llamacpp", "flag", "fake"] = "llamacpp"
    aliases: CommaSeparated = []

    n_ctx: int | None = Field(None, ge=16)  # tokens of one request, prompt and answer
    n_parallel: int = Field(8, ge=1, le=255)  # requests at once
    kv_tokens: int | None = Field(None, ge=16)  # cells that they share
    n_batch: int = Field(512, ge=1)  # most tokens of one step
    max_stall_ms: float = Field(200, gt=0)  # that a new prompt may hold up running streams
    prefix_cache_mb: int | None = Field(None, ge=0)  # of host memory, for prompts seen before
    n_threads: int | None = Field(None, ge=1)
    n_gpu_layers: int = -1  # -1: all

    temperature: float = Field(0.8, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(0.95, ge=0, le=1, allow_inf_nan=False)
    top_k: int = Field(40, ge=-1, lt=2**31)
    min_p: float = Field(0.05, ge=0, le=1, allow_inf_nan=False)
    repeat_penalty: float = Field(1.0, ge=0.01, le=10, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1)  # None: to the end of the context

    tool_format: Literal[
        "auto", "hermes", "llama3", "mistral", "mistral-v11", "harmony", "generic"
    ] = "auto"  # how the model calls tools; auto: by its template

    queue_size: int = Field(64, ge=1)  # requests that may wait
    idle_ttl_s: float = Field(600, ge=0)  # unload when nobody asked for this long
    pin: bool = False  # never unload
    preload: bool = False  # load at start

    queue_texts: int = Field(4096, ge=1)  # of an encoder tier, which counts texts, not requests
    batch_tokens: int = Field(512, ge=1)  # of an encoder's call; a longer text travels alone
    pooling: Literal["auto", "cls", "mean", "last"] = "auto"  # auto: as the file says
    query_prefix: str = ""
    passage_prefix: str = ""
    sparse_head_path: str = ""  # empty: beside the model
    colbert_head_path: str = ""
    token_ids: Literal["refuse", "own", "cl100k"] = "refuse"  # as input: whose they are
    matryoshka: bool | None = None  # trained for shorter vectors; None: where that is known
    embedding_mode: bool | None = None
    embedding_dimension: int | None = Field(None, ge=1)

    @property
    def is_configured(self) -> bool:
        return bool(self.model_path) or self.backend == "fake"

    @property
    def path(self) -> Path:
        """Where the model is; a relative path starts at the project."""
        return ROOT / Path(self.model_path).expanduser()

    def head_path(self, path: str) -> str:
        """Where a head is, as `path`; empty where none is given."""
        return str(ROOT / Path(path).expanduser()) if path else ""

    @model_validator(mode="after")
    def _fits(self) -> "TierSettings":
        if self.n_batch < self.n_parallel:
            raise ValueError(
                f"N_BATCH ({self.n_batch}) must not be less than N_PARALLEL ({self.n_parallel})"
            )
        if self.n_ctx and self.kv_tokens and self.kv_tokens < self.n_ctx:
            raise ValueError(
                f"KV_TOKENS ({self.kv_tokens}) must not be less than N_CTX ({self.n_ctx})"
            )
        return self


class ServerSettings(BaseSettings):
    """What is common to all tiers."""

    model_config = SettingsConfigDict(extra="ignore", env_ignore_empty=True, frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_keys: CommaSeparated = []  # empty: nobody needs one
    allow_insecure: bool = False  # serve other machines without keys
    allowed_hosts: CommaSeparated = []  # beside localhost, HOST and addresses
    cors_origins: CommaSeparated = []  # empty: localhost on any port; *: all
    reasoning_field: ReasoningField = "reasoning_content"  # none: it stays in the text
    strict_params: bool = False  # unknown fields are errors
    max_body_bytes: int = Field(32 << 20, ge=1024)
    max_connections: int = Field(1000, ge=1)
    receive_timeout_s: float = Field(30, gt=0)  # for a head, and between pieces of a body
    send_timeout_s: float = Field(60, gt=0)  # in which a client reads nothing
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    shutdown_grace_s: float = Field(10, ge=0)  # for streams to finish
    worker_timeout_s: float = Field(120, gt=0)  # a step that takes longer hangs


@dataclass(frozen=True, slots=True)
class Settings:
    """The server's settings and the configured tiers'."""

    server: ServerSettings
    tiers: Mapping[TierName, TierSettings]

    @classmethod
    def load(cls, env_file: Path | None = ROOT / ".env") -> "Settings":
        """Read and check everything. The environment wins over the file. Raises SettingsError."""
        faults: list[str] = []
        server = _read(ServerSettings, "", env_file, faults)
        tiers = {name: _read(TierSettings, f"{name.upper()}_", env_file, faults) for name in TIERS}
        if faults:
            raise SettingsError("\n".join(faults))
        for key, nearest in unknown_keys(env_file):
            hint = f"; did you mean {nearest}?" if nearest else ""
            logger.warning("The setting %s is not known and does nothing%s", key, hint)
        for name in ENCODER_TIERS:
            for field in sorted(GENERATING & tiers[name].model_fields_set):
                key = f"{name}_{field}".upper()
                logger.warning("The setting %s does nothing: no text is generated there", key)
        return cls(server, _configured(tiers))


def known_keys() -> list[str]:
    """Every key, in the order of `.env.example`."""
    keys = [name.upper() for name in ServerSettings.model_fields]
    return keys + [
        f"{tier.upper()}_{name.upper()}" for tier in TIERS for name in TierSettings.model_fields
    ]


def unknown_keys(env_file: Path | None) -> list[tuple[str, str | None]]:
    """Keys of the file, and of the environment where a tier's prefix claims them, that do nothing;
    each with the nearest key that does something."""
    known = known_keys()
    prefixes = tuple(f"{tier.upper()}_" for tier in TIERS)
    keys = [key for key in os.environ if key.upper().startswith(prefixes)]
    if env_file is not None and env_file.is_file():
        keys += dotenv_values(env_file)
    unknown = dict.fromkeys(key for key in keys if key.upper() not in known)
    return [
        (key, next(iter(difflib.get_close_matches(key.upper(), known, 1)), None)) for key in unknown
    ]


def _read(of: type[T], prefix: str, env_file: Path | None, faults: list[str]) -> T:
    try:
        return of(_env_prefix=prefix, _env_file=env_file)
    except ValidationError as error:
        for fault in error.errors():
            key = f"{prefix}{fault['loc'][0]}".upper() if fault["loc"] else prefix.rstrip("_")
            given = f" (it is {fault['input']!r})" if fault["loc"] else ""
            faults.append(f"{key}: {fault['msg'].removeprefix('Value error, ')}{given}")
        return of.model_construct()  # stands in until the caller has all faults


def _configured(tiers: dict[TierName, TierSettings]) -> dict[TierName, TierSettings]:
    """Only configured tiers exist; where none is, every chat tier and `embedding` have the default
    models, and that scores for `reranker`."""
    configured = {name: tier for name, tier in tiers.items() if tier.is_configured}
    if configured:
        return configured
    chat = {"model_path": DEFAULT_CHAT_MODEL}
    defaults = {name: tiers[name].model_copy(update=chat) for name in CHAT_TIERS}
    e5 = {
        "model_path": DEFAULT_EMBEDDING_MODEL,
        "query_prefix": tiers["embedding"].query_prefix or "query: ",
        "passage_prefix": tiers["embedding"].passage_prefix or "passage: ",
    }
    return {**defaults, "embedding": tiers["embedding"].model_copy(update=e5)}
