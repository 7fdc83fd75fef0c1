"""The locks pin what the requirements ask for, and nothing of the machine where they were made."""

import importlib.util
import re
from importlib.machinery import SourceFileLoader
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from settings import ROOT

LOCKS = ["requirements.lock", "requirements-dev.lock"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(*names: str) -> list[Requirement]:
    lines = [line.strip() for name in names for line in read(name).splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned(lock: str) -> dict[str, list[Requirement]]:
    """What a lock says of each package: a pin, or one for each range of Pythons."""
    pins: dict[str, list[Requirement]] = {}
    for pin in requirements(lock):
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    return pins


def in_force(marker: Marker | None, python: str) -> bool:
    where = {"python_version": python, "python_full_version": f"{python}.0"}
    return marker is None or marker.evaluate(where)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize(
    ("lock", "asked"),
    [(LOCKS[0], ["requirements.txt"]), (LOCKS[1], ["requirements.txt", "requirements-dev.txt"])],
)
def test_a_lock_satisfies_its_requirements(lock: str, asked: list[str], python: str) -> None:
    pins = pinned(lock)
    for requirement in requirements(*asked):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in {lock}: run scripts/lock"
        chosen = [pin for pin in pins[name] if in_force(pin.marker, python)]
        assert len(chosen) == in_force(requirement.marker, python), name
        for pin in chosen:
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            assert requirement.specifier.contains(specifier.version), f"{pin}: run scripts/lock"


def test_the_locks_agree() -> None:
    service, dev = map(pinned, LOCKS)
    for name, pins in service.items():
        assert {str(pin.specifier) for pin in pins} <= {str(pin.specifier) for pin in dev[name]}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_says_nothing_of_where_it_was_made(lock: str) -> None:
    assert not re.search(r"://|index|/tmp|/home|/root|/work|/Users| @ ", read(lock))


@pytest.mark.parametrize("lock", LOCKS)
def test_what_only_an_extra_needs_is_not_locked(lock: str) -> None:
    extras = {canonicalize_name(r.name) for r in requirements("requirements-flag.txt")}
    assert not (extras | {"triton", "nvidia-cublas"}) & pinned(lock).keys()


# docs/licences.md


@pytest.fixture(scope="module")
def licences() -> ModuleType:
    loader = SourceFileLoader("licences", str(ROOT / "scripts" / "licences"))
    spec = importlib.util.spec_from_loader("licences", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_licence_of_every_package_is_in_the_list(licences: ModuleType) -> None:
    packages = read("docs/licences.md").split("## Packages")[1].split("## Models")[0]
    rows = dict(re.findall(r"^\| ([a-z][\w.-]*) \| (.+) \|$", packages, re.M))
    assert rows.keys() == pinned("requirements.lock").keys(), "run scripts/licences"
    assert all(len(licence) < 80 for licence in rows.values())
    for name, pins in pinned("requirements.lock").items():
        if is_installed(name, pins):  # another release may have another licence
            assert licences.row(name) == f"| {name} | {rows[name]} |"


def is_installed(name: str, pins: list[Requirement]) -> bool:
    try:
        return any(pin.specifier.contains(version(name)) for pin in pins)
    except PackageNotFoundError:
        return False
