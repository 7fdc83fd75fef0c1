import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants  # noqa: F401  # reads HF_HUB_OFFLINE once, which backends set
import hypothesis
import pytest

from settings import DEFAULT_CHAT_MODEL, DEFAULT_EMBEDDING_MODEL, ROOT, known_keys
from tests import gguf_fixtures

# no limit on the time of an example: the machine may be busy
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")
# for test_fuzz*.py, test_cache*.py and test_flights.py: pytest --hypothesis-profile=deep
hypothesis.settings.register_profile("deep", max_examples=3334)

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture(autouse=True, scope="session")
def clean_environment() -> Iterator[None]:
    """No test depends on what its caller has configured, for the services or for all programs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for key in (*known_keys(), *PROXIES, *map(str.lower, PROXIES)):
            monkeypatch.delenv(key, raising=False)
        yield


@pytest.fixture(autouse=True)
def kept_environment() -> Iterator[None]:
    """No test depends on what another has set, as backends do for their libraries."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    path = ROOT / DEFAULT_CHAT_MODEL
    assert path.is_file(), "the default model is not there: run ./setup.sh"
    return path


@pytest.fixture(scope="session")
def e5() -> Path:
    path = ROOT / DEFAULT_EMBEDDING_MODEL
    assert path.is_file(), "the default embedding model is not there: run ./setup.sh"
    return path


@pytest.fixture(scope="session")
def tiny_mlx(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a directory for MLX."""
    from models.convert import gguf_to_mlx

    folder = tmp_path_factory.mktemp("tiny") / "tiny-mlx"
    gguf_to_mlx.convert(tiny, folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_mlx(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models.convert import gguf_to_mlx

    folder = tmp_path_factory.mktemp("smollm2") / "smollm2-mlx"
    gguf_to_mlx.convert(smollm2, folder)
    return folder


@pytest.fixture
def load() -> Iterator[Callable[..., Any]]:
    """Loads an engine, which the end of the test closes."""
    from tests.engines import engine_of

    engines: list[Any] = []

    def load(model: Path, **values: Any) -> Any:
        engines.append(engine_of(model, **values))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


@pytest.fixture
def load_encoder() -> Iterator[Callable[..., Any]]:
    """Makes a plain_encoder.Encoder, which the end of the test closes."""
    from tests.plain_encoder import loading

    with loading() as load:
        yield load


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights with SmolLM2's vocabulary (BPE)."""
    folder = tmp_path_factory.mktemp("tiny")
    return gguf_fixtures.write_tiny_llama(folder / "tiny.gguf", vocab_from=smollm2)
