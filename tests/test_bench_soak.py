"""The soak, for a minute."""

import json

import pytest

from bench import soak


@pytest.mark.timeout(180)
def test_nothing_is_lost_held_or_leaked_for_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    code = soak.main(["--seconds", "60"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0, found
    assert found["answers"] > 100
    assert found["workers_killed"] > 3
    assert found["cache_hits"] > 0
