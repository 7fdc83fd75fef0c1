from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from settings import DEFAULT_CHAT_MODEL, DEFAULT_EMBEDDING_MODEL, ROOT, known_keys
from tests import gguf_fixtures

# for test_fuzz*.py, test_cache*.py and test_flights.py: pytest --hypothesis-profile=deep
hypothesis.settings.register_profile("deep", max_examples=3334)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what its caller has configured."""
    for key in known_keys():
        monkeypatch.delenv(key, raising=False)


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
