"""As test_fuzz.py, over every route of a service with keys: who has no right key is told nothing
and changes nothing, and nobody breaks anything."""

import json
from collections.abc import Iterator
from typing import Any, Literal
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serving import Service, fake, serving, settings, wait_until
from tests.test_fuzz import ANY_NUMBER, ODD, bodies, other_bodies
from tests.test_fuzz_vectors import EMBEDDINGS, RERANKS, SCORES, TEI

USER, ADMIN = "xyzzy-user", "xyzzy-admin"
Who = Literal["nobody", "user", "admin"]
WRONG = [
    "",
    "xyzzy",
    "xyzzy-use",
    "xyzzy-users",
    "XYZZY-USER",
    "xyzzy-user,xyzzy-admin",
    "\xe9",
    "*",
]
PUBLIC = ("/health", "/ready")
CHANGING = ("/load", "/unload")  # ends of paths

Headers = dict[str, bytes]


@st.composite
def credentials(draw: st.DrawFn) -> tuple[Headers, Who]:
    """Headers, and who that is."""
    of: dict[str, Who] = {USER: "user", ADMIN: "admin"}
    key = draw(st.one_of(st.just(USER), st.just(ADMIN), st.sampled_from(WRONG)))
    way = draw(st.sampled_from(["Bearer ", "bearer ", "x-api-key", "x-api-key", "Basic ", "both"]))
    sent = key.encode("latin-1")
    if way == "x-api-key":
        return {"x-api-key": sent}, of.get(key, "nobody")
    if way == "both":  # the first one counts
        return {"authorization": b"Bearer wrong", "x-api-key": sent}, "nobody"
    who = of.get(key, "nobody") if way != "Basic " else "nobody"
    return {"authorization": (way.encode() + sent).strip()}, who


MODEL = st.sampled_from(
    ["light", "embedding", "reranker", "fake", "a/b", "...", "\xe9", "light/load"]
)
BODIES: dict[str, st.SearchStrategy[Any]] = {
    "/v1/chat/completions": bodies(),
    "/v1/completions": bodies(),
    "/v1/responses": other_bodies(),
    "/v1/messages": other_bodies(),
    "/v1/messages/count_tokens": other_bodies(),
    "/v1/embeddings": EMBEDDINGS,
    "/v1/rerank": RERANKS,
    "/v1/score": SCORES,
    "/embed": TEI,
    "/embed_sparse": TEI,
}
FORCE = st.fixed_dictionaries({}, optional={"force": st.booleans()})
OTHER = st.one_of(st.none(), FORCE, FORCE, st.dictionaries(st.just("force"), ODD), ODD)


def changes(method: str, path: str) -> bool:
    """Changes the service, which wants a key of its own."""
    return path.endswith(CHANGING) or method == "DELETE"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    keys = {"api_keys": [USER], "admin_api_keys": [ADMIN]}
    tiers = {"light": fake(n_ctx=512, max_tokens=4), "embedding": fake(n_ctx=64)}
    with serving(settings(keys, **tiers)) as service:
        yield service


@pytest.fixture(scope="module")
def routes(service: Service) -> list[tuple[str, str]]:
    """Every method and path that the service says it has; of the admin's as many."""
    document = service.http.get("/openapi.json", headers={"x-api-key": USER}).json()
    found = [
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    ]
    assert len(found) > 20
    changing = [route for route in found if changes(*route)]
    return found + changing * (len(found) // len(changing))


@ANY_NUMBER
@given(data=st.data(), asked=credentials())
def test_any_request_is_answered_or_refused_as_its_key_says(
    service: Service, routes: list[tuple[str, str]], data: Any, asked: tuple[Headers, Who]
) -> None:
    headers, who = asked
    method, path = data.draw(st.sampled_from([*routes, ("GET", "/nowhere"), ("PUT", "/metrics")]))
    body = data.draw(BODIES.get(path, OTHER)) if method == "POST" else None
    url = path.replace("{model}", quote(data.draw(MODEL))) if "{" in path else path
    if path == "/ready" and (tier := data.draw(st.sampled_from(["", "light", "heavy", "\xe9"]))):
        url += f"?tier={quote(tier)}"
    before = [tier.state for tier in service.manager.tiers.values()]
    reply = service.http.request(
        method,
        url,
        content=b"" if body is None else json.dumps(body).encode(),
        headers=headers | ({"content-type": b"application/json"} if body is not None else {}),
    )
    assert reply.status_code in (200, 400, 401, 403, 404, 405), reply.text
    assert "xyzzy" not in reply.text + str(reply.headers), "no key comes back"
    if reply.status_code != 200:
        assert reply.json()["error"]["message"]
    may_ask = who != "nobody" or path in PUBLIC
    assert (reply.status_code == 401) == (not may_ask)
    if changes(method, path) and who == "user":
        assert reply.status_code in (403, 400), "400: a body that is no JSON is noticed first"
        may_ask = False
    else:
        assert reply.status_code != 403
    if not may_ask:
        assert [tier.state for tier in service.manager.tiers.values()] == before


def test_nothing_is_left_behind(service: Service) -> None:
    headers = {"x-api-key": ADMIN}
    for name, tier in service.manager.tiers.items():
        wait_until(lambda tier=tier: not tier._running and not tier._n_leases)
        assert not tier._waiting
        for what, state in (("load", "ready"), ("unload", "stopped")):
            assert service.http.post(f"/v1/models/{name}/{what}", headers=headers).is_success
            assert tier.state == state
