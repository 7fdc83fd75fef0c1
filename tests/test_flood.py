"""A flood of requests that can wait does not hold up one that cannot."""

import statistics
import time
from pathlib import Path

from tests.serving import Service, fake, script, serving, settings

N_JOBS = 200
STEP_S = 0.1
TOKEN_S = 0.5e-3
N_BATCH = 64  # most tokens of a step
CHUNK_S = N_BATCH * TOKEN_S  # the longest that prompts take of a step
SLACK_S = 1.5 * STEP_S  # for a machine that has other things to do


def first_token_s(service: Service, n: int) -> float:
    """How long an urgent request waits for its first token."""
    started_at = time.monotonic()
    body = {"model": "light", "prompt": f"{n}: urgent", "stream": True, "max_tokens": 1,
            "service_tier": "priority"}  # fmt: skip
    with service.http.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        assert any('"waiting":' not in line for line in reply.iter_lines() if line)
        return time.monotonic() - started_at


def test_a_flood_adds_a_step_and_a_chunk_to_an_urgent_first_token(tmp_path: Path) -> None:
    values = {"step_ms": 1e3 * STEP_S, "token_us": 1e6 * TOKEN_S}
    path = script(tmp_path, {"match": "flood", "answer": "x" * 400}, **values)
    light = fake(path, n_parallel=4, n_batch=N_BATCH, queue_size=N_JOBS)
    with serving(settings({"comment_after_s": 10 * STEP_S}, light=light)) as service:
        tier = service.manager.tiers["light"]
        first_token_s(service, 0)  # loads the model
        quiet_s = statistics.median(first_token_s(service, n) for n in range(1, 4))
        body = {"model": "light", "stream": True, "service_tier": "flex",
                "prompt": [f"{n}: {'x' * 300} flood" for n in range(N_JOBS)]}  # fmt: skip
        with service.http.stream("POST", "/v1/completions", json=body) as flood:
            assert flood.status_code == 200
            lines = flood.iter_lines()  # its end would end the request
            assert '"waiting":"queue ' in next(lines)
            flooded_s = [first_token_s(service, n) for n in range(10, 17)]
            assert tier.n_waiting + tier.n_running == N_JOBS, "nobody has left meanwhile"
        # the machine may have been busy at some of them
        assert statistics.median(flooded_s) < quiet_s + STEP_S + CHUNK_S + SLACK_S
