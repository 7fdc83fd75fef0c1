"""All settings, from the environment and `.env`: one class for the server, one for each tier.

Read once, at start. `.env.example` lists every key; a key that nobody knows is warned of.
"""

import difflib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from dotenv import dotenv_values
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from hub import Hub
from hub_model import FOLDER_BACKENDS, HubModel, parse

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=BaseSettings)

ROOT = Path(__file__).resolve().parent
DEFAULT_CHAT_MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"  # setup.sh puts both there
DEFAULT_EMBEDDING_MODEL = "models/multilingual-e5-small-F32.gguf"

InputType = Literal["query", "search_query", "passage", "document", "search_document", "none"]
ReasoningField = Literal["reasoning_content", "reasoning", "both", "none"]
TierName = Literal["light", "medium", "heavy", "embedding", "reranker"]
CHAT_TIERS: tuple[TierName, ...] = ("light", "medium", "heavy")
ENCODER_TIERS: tuple[TierName, ...] = ("embedding", "reranker")
TIERS: tuple[TierName, ...] = (*CHAT_TIERS, *ENCODER_TIERS)
# of a tier that generates text
GENERATING = {
    "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens", "tool_format",
    "speculation", "flash_attention", "n_parallel", "kv_tokens", "n_batch", "max_stall_ms",
    "prefix_cache_mb",
}  # fmt: skip
# of the one that embeds
EMBEDDING = {
    "pooling", "query_prefix", "passage_prefix", "input_type", "token_ids", "matryoshka",
    "embedding_mode", "embedding_dimension", "sparse_head_path", "colbert_head_path",
}  # fmt: skip
# of encoders
ENCODING = {"queue_texts", "batch_tokens", "truncate"}
# of other backends
IDLE_WITH = {"mlx": {"n_threads", "flash_attention"}, "onnx": {"n_gpu_layers"}}
SECRETS = {"api_keys", "api_keys_file", "admin_api_keys"}  # faults in them quote nothing
LEAST_LIKENESS = 0.9  # of a variable of the environment to a key, to be taken for it misspelt
FOREIGN = {"CCACHE_DIR"}  # variables of other programs that are as like
# one pattern for localhost on any port, as browsers write origins
LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


def _split(value: Any) -> Any:
    """Items of a comma-separated text. Nothing between commas is no item: it would be a key that
    everybody has."""
    if not isinstance(value, str):
        return value
    return [item for part in value.split(",") if (item := part.strip())]


def _has_a_home(path: str) -> str:
    """A path that begins with a `~` is somebody's."""
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ValueError("the ~ is of no user that this machine knows") from None
    return path


def _read_keys(value: Any) -> Any:
    """The keys in a file, a line each; lines that begin with # are comments."""
    if not isinstance(value, str):
        return value
    path = ROOT / Path(_has_a_home(value)).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        if os.name == "posix" and path.stat().st_mode & 0o077:
            logger.warning("API_KEYS_FILE: others may open the file; `chmod 600` keeps them out")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"the file cannot be read: {reason}") from error
    keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    if not keys:
        raise ValueError("there is no key in the file")
    return keys


def _fit_for_headers(keys: list[SecretStr]) -> list[SecretStr]:
    """Other characters have several forms in a header, or none: such a key would never fit."""
    for n, key in enumerate(keys, 1):
        if not re.fullmatch(r"[!-~]+", key.get_secret_value()):
            raise ValueError(f"key {n} must be of printable ASCII characters without spaces")
    return keys


def _as_browsers_write(origins: list[str]) -> list[str]:
    """Origins are compared letter by letter: another form would never fit."""
    for origin in origins:
        if origin in ("*", "null"):
            continue
        if "*" in origin:
            raise ValueError(f"{origin}: there are no patterns; name each origin, or * for all")
        if not re.fullmatch(r"[!-~]+", origin):
            raise ValueError(f"{origin}: write it in ASCII, as browsers do (xn--…)")
        scheme, _, rest = origin.rpartition("://")
        scheme = scheme.lower() or "https"
        host = re.split("[/?#]", rest)[0].lower()
        usual_port = {"http": ":80", "https": ":443"}.get(scheme, "/")  # browsers leave it out
        fit = f"{scheme}://{host.removesuffix(usual_port)}"
        if origin != fit:
            raise ValueError(f"{origin}: browsers write an origin otherwise; write {fit}")
    return origins


def _as_in_a_head(hosts: list[str]) -> list[str]:
    """Names are compared with a Host header without its port. Addresses are served anyway."""
    for host in hosts:
        if host == "*" or host.count(":") > 1:
            continue
        found = _HOST.fullmatch(host)
        if not found:
            raise ValueError(f"{host}: that is no name, and there are no patterns; name each host, "
                             "such as box.lan, or * for all")  # fmt: skip
        if host != found["name"]:
            raise ValueError(f"{host}: give the name alone; write {found['name']}")
    return hosts


_HOST = re.compile(r"(?:\w+://)?(?P<name>\w[\w.-]*)(?::\d*)?(?:/.*)?", re.ASCII)

PathText = Annotated[str, AfterValidator(_has_a_home)]
CommaSeparated = Annotated[list[str], NoDecode, BeforeValidator(_split)]
Keys = Annotated[
    list[SecretStr], NoDecode, BeforeValidator(_split), AfterValidator(_fit_for_headers)
]
KeysInFile = Annotated[
    list[SecretStr], NoDecode, BeforeValidator(_read_keys), AfterValidator(_fit_for_headers)
]


def _memory_limit(value: Any) -> str:
    text = str(value).strip()
    match = _MEMORY.fullmatch(text)
    if not match:
        raise ValueError("give a share such as 80%, or a size such as 12G or 900M")
    if match[2] != "%" and _size_bytes(match) < 1 << 20:
        share = float(match[1]) * (100 if "." in match[1] else 1)
        hint = f", such as {share:g}%" if not match[2] and share <= 100 else ""
        raise ValueError(f"that is less than a megabyte; a share ends in %{hint}")
    return text


def _size_bytes(match: re.Match[str]) -> int:
    unit = match[2][:1].upper().removesuffix("B")
    return int(float(match[1]) * 1024 ** " KMGT".index(unit or " "))


_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]i?B?|B?)", re.IGNORECASE)
MemoryLimit = Annotated[str, BeforeValidator(_memory_limit)]


def _is_folder(model_path: object) -> bool:
    """There is a directory with a model as Hugging Face has it."""
    if not isinstance(model_path, str) or not model_path or "\0" in model_path:
        return False
    folder = ROOT / os.path.expanduser(model_path)
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


class SettingsError(Exception):
    """The configuration cannot be used; the message says which keys and why, a line each."""


class TierSettings(BaseSettings):
    """One tier, its keys without their prefix. None: decided from the model and the machine."""

    model_config = SettingsConfigDict(
        extra="ignore", env_ignore_empty=True, protected_namespaces=(), frozen=True
    )

    model_path: PathText = ""
    backend: Literal["llamacpp", "mlx", "onnx", "flag", "fake"] = "llamacpp"
    aliases: CommaSeparated = []

    n_ctx: int | None = Field(None, ge=16)  # tokens of one request, prompt and answer
    n_parallel: int = Field(8, ge=1, le=255)  # requests at once
    kv_tokens: int | None = Field(None, ge=16)  # cells that they share
    n_batch: int = Field(512, ge=1)  # most tokens of one step
    max_stall_ms: float | None = Field(None, gt=0)  # that a new prompt may hold up running streams
    prefix_cache_mb: int | None = Field(None, ge=0)  # of host memory, for prompts seen before
    speculation: bool = True  # guesses tokens from what was said before, where that pays
    flash_attention: bool = True  # off is faster far into few conversations, without AVX-512
    n_threads: int | None = Field(None, ge=1)
    n_gpu_layers: int = -1  # -1: all

    temperature: float = Field(0.8, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(0.95, ge=0, le=1, allow_inf_nan=False)
    top_k: int = Field(40, ge=-1, lt=2**31)
    min_p: float = Field(0.05, ge=0, le=1, allow_inf_nan=False)
    repeat_penalty: float = Field(1.0, ge=0.01, le=10, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1)  # None: to the end of the context

    tool_format: Literal[
        "auto",
        "hermes",
        "qwen3-coder",
        "seed-oss",
        "minimax-m2",
        "minicpm5",
        "glm",
        "gemma4",
        "kimi-k2",
        "deepseek-v3.1",
        "lfm2",
        "granite3",
        "phi4-mini",
        "nemotron2",
        "apriel",
        "command",
        "north",
        "llama3",
        "mistral",
        "mistral-v11",
        "harmony",
        "generic",
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
    input_type: InputType | None = None  # of texts whose request does not say; None: none
    truncate: Literal["none", "end", "start"] = "none"  # the same texts, where they are too long
    sparse_head_path: PathText = ""  # empty: beside the model
    colbert_head_path: PathText = ""
    token_ids: Literal["refuse", "own", "cl100k"] = "refuse"  # as input: whose they are
    matryoshka: bool | None = None  # trained for shorter vectors; None: where that is known
    embedding_mode: bool | None = None
    embedding_dimension: int | None = Field(None, ge=1)

    @property
    def is_configured(self) -> bool:
        return bool(self.model_path) or self.backend == "fake"

    @property
    def path(self) -> Path:
        """Where the model is; a relative path starts at the project. For a model on the hub it is
        nowhere: see `hub_model`."""
        return ROOT / Path(self.model_path).expanduser()

    @property
    def hub_model(self) -> HubModel | None:
        """The model on the Hugging Face hub that is meant, if it is one."""
        return None if self.backend == "fake" else parse(self.model_path)

    def at(self, path: Path) -> "TierSettings":
        """The same for a model that has been found there."""
        return self.model_copy(update={"model_path": str(path)})

    def head_path(self, path: str) -> str:
        """Where a head is, as `path`; empty where none is given."""
        return str(ROOT / Path(path).expanduser()) if path else ""

    @field_validator("model_path")
    @classmethod
    def _names_a_model(cls, path: str) -> str:
        parse(path)
        return path

    @model_validator(mode="before")
    @classmethod
    def _knows_folders(cls, given: dict[str, Any]) -> dict[str, Any]:
        """A model directory without a BACKEND is MLX's."""
        is_folder = "backend" not in given and _is_folder(given.get("model_path"))
        return given | {"backend": "mlx"} if is_folder else given

    @model_validator(mode="after")
    def _fits(self) -> "TierSettings":
        if self.backend in FOLDER_BACKENDS and self.hub_model and self.hub_model.what:
            raise ValueError(
                f"MODEL_PATH names '{self.hub_model.what}' in a repo, and BACKEND={self.backend} "
                f"takes all of it: hf:{self.hub_model.repo}"
            )
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

    model_config = SettingsConfigDict(
        extra="ignore", env_ignore_empty=True, hide_input_in_errors=True, frozen=True
    )

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_keys: Keys = []
    api_keys_file: KeysInFile = []  # what is in it, added to the others
    admin_api_keys: Keys = []  # empty: whoever may ask may also change the service
    allow_insecure: bool = False  # serve other machines without keys
    allowed_hosts: Annotated[
        CommaSeparated, AfterValidator(_as_in_a_head)
    ] = []  # beside localhost, HOST and addresses
    cors_origins: Annotated[
        CommaSeparated, AfterValidator(_as_browsers_write)
    ] = []  # empty: localhost on any port; *: all
    reasoning_field: ReasoningField = "reasoning_content"  # none: it stays in the text
    strict_params: bool = False  # unknown fields are errors
    max_body_bytes: int = Field(32 << 20, ge=1024)
    max_connections: int = Field(1000, ge=1)
    receive_timeout_s: float = Field(30, gt=0)  # for a head, and between pieces of a body
    send_timeout_s: float = Field(60, gt=0)  # in which a client reads nothing
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    shutdown_grace_s: float = Field(10, ge=0)  # for streams to finish
    watchdog_s: float = Field(120, gt=0)  # a step that takes longer hangs
    memory_limit: MemoryLimit = "80%"  # of all workers together
    swap_wait_s: float = Field(30, ge=0)  # until models that are in use make way for others
    queue_timeout_s: float = Field(600, gt=0)  # that a request may wait
    comment_after_s: float = Field(10, ge=0)  # that a stream has waited
    request_timeout_s: float = Field(3600, gt=0)  # that it may take in all
    cache_max_mb: int = Field(256, ge=0)  # of memory, for results; 0: nothing is remembered
    cache_ttl_s: float = Field(86400, ge=0)  # that a result lives; 0: for ever
    cache_dir: PathText = ""  # empty: none are on disk
    cache_disk_max_mb: int = Field(1024, ge=16)
    cache_policy: Literal["off", "repeatable", "all"] = "repeatable"  # which are remembered
    cache_shared: bool = False  # between the clients of all keys

    # of the Hugging Face hub, by the names that its own programs have for them
    hf_token: SecretStr = SecretStr("")  # empty: whom `hf auth login` has logged in
    hf_home: str = ""
    hf_hub_cache: str = ""
    hf_endpoint: str = "https://huggingface.co"
    hf_hub_offline: bool = False

    def memory_limit_bytes(self, total_bytes: int) -> int:
        """MEMORY_LIMIT on a machine with so much."""
        match = _MEMORY.fullmatch(self.memory_limit)
        assert match is not None
        if match[2] == "%":
            return int(total_bytes * float(match[1]) / 100)
        return _size_bytes(match)

    @property
    def keys(self) -> list[SecretStr]:
        """All keys that open the service; with none nobody needs one."""
        return [*self.api_keys, *self.api_keys_file, *self.admin_api_keys]

    @property
    def cache_path(self) -> Path | None:
        """CACHE_DIR; a relative path starts at the project."""
        return ROOT / Path(self.cache_dir).expanduser() if self.cache_dir else None

    @property
    def hub(self) -> Hub:
        """Where models come from that a path names as hf:…, and where they are kept."""
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = self.hf_home or os.path.join(caches, "huggingface")
        cache = os.path.expandvars(self.hf_hub_cache or os.path.join(home, "hub"))
        return Hub(
            endpoint=self.hf_endpoint.rstrip("/"),
            cache=Path(os.path.abspath(os.path.expanduser(cache))),
            token=self.hf_token.get_secret_value() or None,
            is_offline=self.hf_hub_offline,
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """The server's settings and the configured tiers'."""

    server: ServerSettings
    tiers: Mapping[TierName, TierSettings]
    reranker_aliases: Sequence[str] = ()  # where it has no model, and `embedding` stands in

    @classmethod
    def load(cls, env_file: Path | None = ROOT / ".env") -> "Settings":
        """Read and check everything. The environment wins over the file. Raises SettingsError."""
        in_file = _in_file(env_file)
        faults: list[str] = []
        server = _read(ServerSettings, "", env_file, faults)
        tiers = {name: _read(TierSettings, f"{name.upper()}_", env_file, faults) for name in TIERS}
        configured = _configured(tiers)
        aliases = () if "reranker" in configured else tiers["reranker"].aliases
        if faults or (faults := _clashes_of_aliases(configured, aliases)):
            raise SettingsError("\n".join(faults))
        if None in in_file.values():  # it may be a key that slipped to the next line
            logger.warning("A line of %s without `=` does nothing", env_file)
        for key, nearest in unknown_keys(env_file):
            hint = f"; did you mean {nearest}?" if nearest else ""
            logger.warning("The setting %s is not known and does nothing%s", key, hint)
        for name, tier in tiers.items():
            _warn_of_idle_keys(name, tier, is_configured=name in configured)
        return cls(server, configured, aliases)


def known_keys() -> list[str]:
    """Every key, in the order of `.env.example`."""
    keys = [name.upper() for name in ServerSettings.model_fields]
    return keys + [
        f"{tier.upper()}_{name.upper()}" for tier in TIERS for name in TierSettings.model_fields
    ]


def unknown_keys(env_file: Path | None) -> list[tuple[str, str | None]]:
    """Keys of the file that do nothing, and of the environment where a tier's prefix claims them or
    one of the server's is nearly the same; each with the nearest key that does something."""
    known = known_keys()
    keys = [key for key in os.environ if _is_meant_for_us(key.upper())]
    keys += [key for key, value in _in_file(env_file).items() if value is not None]
    unknown = dict.fromkeys(key for key in keys if key.upper() not in known)
    return [
        (key, next(iter(difflib.get_close_matches(key.upper(), known, 1)), None)) for key in unknown
    ]


def _is_meant_for_us(key: str) -> bool:
    if key.startswith(tuple(f"{tier.upper()}_" for tier in TIERS)):
        return True
    servers = [name.upper() for name in ServerSettings.model_fields]
    return key not in FOREIGN and bool(difflib.get_close_matches(key, servers, 1, LEAST_LIKENESS))


def _clashes_of_aliases(
    tiers: Mapping[TierName, TierSettings], reranker_aliases: Sequence[str]
) -> list[str]:
    """Names that would mean two tiers."""
    given = {name: tier.aliases for name, tier in tiers.items()}
    if "embedding" in tiers:  # which stands in, where there is no reranker
        given.setdefault("reranker", [*reranker_aliases])
    faults = []
    owners: dict[str, TierName] = {}
    for name, aliases in given.items():
        for alias in aliases:
            owner = owners.setdefault(alias, name)
            if alias in given and alias != name:
                faults.append(f"{name.upper()}_ALIASES: {alias} is the name of another tier")
            elif owner != name:
                faults.append(f"{name.upper()}_ALIASES: {alias} is in {owner.upper()}_ALIASES too")
    return faults


def _warn_of_idle_keys(name: TierName, tier: TierSettings, *, is_configured: bool) -> None:
    """Of the keys of a tier that are set those that do nothing."""
    if not is_configured:
        used = {"aliases"} if name == "reranker" else set()  # of the tier that stands in
        if keys := _keys(name, tier.model_fields_set - used):
            logger.warning("%s: without %s_MODEL_PATH there is no such tier, so that does nothing",
                           ", ".join(keys), name.upper())  # fmt: skip
        return
    why = dict.fromkeys(
        IDLE_WITH.get(tier.backend, ()), f"the backend {tier.backend} has no use for it"
    )
    if name in CHAT_TIERS:
        why |= dict.fromkeys(EMBEDDING | ENCODING, "nothing is embedded or scored there")
    else:
        why |= dict.fromkeys(GENERATING, "no text is generated there")
        why["queue_size"] = "texts are counted there, by QUEUE_TEXTS"
    if name == "reranker":
        why |= dict.fromkeys(EMBEDDING, "nothing is embedded there")
    for field in sorted(tier.model_fields_set & why.keys()):
        logger.warning("The setting %s does nothing: %s", f"{name}_{field}".upper(), why[field])


def _keys(name: TierName, fields: set[str]) -> list[str]:
    return [f"{name}_{field}".upper() for field in sorted(fields)]


def _in_file(env_file: Path | None) -> Mapping[str, str | None]:
    try:
        return {} if env_file is None or not env_file.is_file() else dotenv_values(env_file)
    except UnicodeDecodeError:
        raise SettingsError(f"{env_file}: it is not in UTF-8; save it in that encoding") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SettingsError(f"{env_file}: it cannot be read: {reason}") from error


def _read(of: type[T], prefix: str, env_file: Path | None, faults: list[str]) -> T:
    try:
        return of(_env_prefix=prefix, _env_file=env_file)
    except ValidationError as error:
        for fault in error.errors():
            key = f"{prefix}{fault['loc'][0]}".upper() if fault["loc"] else prefix.rstrip("_")
            is_secret = fault["loc"] and str(fault["loc"][0]) in SECRETS
            given = f" (it is {fault['input']!r})" if fault["loc"] and not is_secret else ""
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
        # it was trained on no text without a prefix
        "input_type": tiers["embedding"].input_type or "document",
    }
    return {**defaults, "embedding": tiers["embedding"].model_copy(update=e5)}
