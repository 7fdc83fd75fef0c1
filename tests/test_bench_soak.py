"""The soak, for a minute, and what its faults meet."""

import asyncio
import json
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
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


def test_a_worker_that_has_ended_since_it_was_listed_is_no_failure() -> None:
    ended = subprocess.Popen(["true"])
    listed = psutil.Process(ended.pid)
    ended.wait()
    server = cast(psutil.Process, SimpleNamespace(children=lambda: [listed]))
    tally = soak.Tally()
    breaker = soak.Breaker(server, Path("unused"), tally, random.Random(1))
    asyncio.run(breaker.kill_worker())
    assert tally.kills == 0
