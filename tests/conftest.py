import pytest

from settings import known_keys


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what its caller has configured."""
    for key in known_keys():
        monkeypatch.delenv(key, raising=False)
