"""docs/performance.md: its tables and pictures, out of what bench/compare.py has measured."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from bench.growth import AXES, KINDS
from bench.scenarios import FIGURES, LEVELS, SCENARIOS, Metric
from bench.servers import LLAMA_CPP_PYTHON, LLAMA_SERVER, OURS

BEGIN, END = "<!-- what bench/compare.py wrote -->", "<!-- its end -->"
MAX_PICTURE_BYTES = 60_000
PICTURES = {
    "streams.svg": "Tokens/s by the number of streams",
    "growth_prompt.svg": "First token, speed and memory by the length of the prompt",
    "growth_streams.svg": "First token, speed and memory by the number of streams",
    "growth_remembered.svg": "First token, speed and memory by the number of remembered prompts",
}
Report = dict[str, Any]  # by scenario: `about` and `rounds`


def write(docs: Path, report: Report) -> None:
    """Put what was measured in place of what was there of the same scenarios."""
    store = docs / "performance.json"
    known: Report = json.loads(store.read_text()) if store.exists() else {}
    order = [*SCENARIOS, *FIGURES]
    known = {name: (known | report)[name] for name in order if name in known | report}
    known = _rounded(known)
    store.write_text(json.dumps(known, indent=1) + "\n")
    page = docs / "performance.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    draw(docs / "pictures", known)
    shown = "\n".join([*table_rows(known), *picture_rows(docs)])
    page.write_text(f"{before}{BEGIN}\n\n{shown}\n\n{END}{after}", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def values(rounds: list[dict[str, dict[str, float]]], server: str, metric: str) -> list[float]:
    """One a round; none where the server was not there."""
    return [found[server][metric] for found in rounds if metric in found.get(server, {})]


def ratios(rounds: list[dict[str, dict[str, float]]], peer: str, metric: str) -> list[float]:
    """Ours over the peer's, within each round, in order of size."""
    pairs = zip(values(rounds, OURS, metric), values(rounds, peer, metric), strict=False)
    return sorted(ours / theirs for ours, theirs in pairs if theirs)


def table_rows(report: Report) -> Iterator[str]:
    peers = [
        peer for peer in (LLAMA_SERVER, LLAMA_CPP_PYTHON)
        if any(peer in found for part in report.values() for found in part["rounds"])
    ]  # fmt: skip
    yield f"| What | Quintet | {' | '.join((*peers, f'Quintet / {LLAMA_SERVER}'))} | Goal |"
    yield "|---" * (4 + len(peers)) + "|"
    metrics = {name: scenario.metrics for name, scenario in SCENARIOS.items()} | FIGURES
    for name, part in report.items():
        for key, metric in metrics[name].items():
            if not (ours := values(part["rounds"], OURS, key)):
                continue
            cells = [metric.about, _number(median(ours), metric)]
            for peer in peers:
                theirs = values(part["rounds"], peer, key)
                cells.append(_number(median(theirs), metric) if theirs else "")
            found = ratios(part["rounds"], LLAMA_SERVER, key)
            cells.append(
                f"{median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})" if found else ""
            )
            cells.append(_goal(metric))
            yield f"| {' | '.join(cells)} |"
    yield ""
    yield from _sources(report)


def _number(value: float, metric: Metric) -> str:
    return f"{value:,.{metric.digits}f}"


def _goal(metric: Metric) -> str:
    if metric.goal is None:
        return ""
    return f"{'at least' if metric.more_is_better else 'at most'} {metric.goal:,g}"


def _sources(report: Report) -> Iterator[str]:
    """Where and when, once for all scenarios that agree about it."""
    known: dict[str, list[str]] = {}
    for name, part in report.items():
        known.setdefault(f"{len(part['rounds'])} {json.dumps(part['about'])}", []).append(name)
    for key, names in known.items():
        n_rounds, _, text = key.partition(" ")
        about = json.loads(text)
        where = about["machine"]
        cpu = f"{where['cpu']} ({where['vectors']})" if where["vectors"] else where["cpu"]
        hardware = f"{cpu}, {where['cores']} cores, {where['memory_gb']} GB"
        software = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        yield (
            f"- {', '.join(names)}: {about['date']}, medians of {n_rounds} rounds; {hardware}, "
            f"{where['system']}; {about['model']}, {about['threads']} threads, "
            f"{about['slots']} sequences, {about['cells']:,} cells; {software}."
        )


def picture_rows(docs: Path) -> Iterator[str]:
    """Those that have been drawn."""
    for name, about in PICTURES.items():
        if (docs / "pictures" / name).exists():
            yield f"\n![{about}](pictures/{name})"


def draw(folder: Path, report: Report) -> None:
    """The pictures, where matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        print("without pictures: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("svg")
    # text stays text; nothing random or of today, so that the same numbers give the same file
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "performance"}
    if report.keys() & {"streams", "growth"}:
        folder.mkdir(exist_ok=True)
    if "streams" in report:
        _draw_streams(folder / "streams.svg", report["streams"]["rounds"])
    if "growth" in report:
        for axis in AXES:
            _draw_growth(folder / f"growth_{axis}.svg", report["growth"]["rounds"], axis)


def _draw_streams(path: Path, rounds: list[dict[str, dict[str, float]]]) -> None:
    lines = {}
    for server in (OURS, LLAMA_SERVER, LLAMA_CPP_PYTHON):
        points = {n: values(rounds, server, f"streams_{n}") for n in LEVELS}
        lines[server] = {n: median(found) for n, found in points.items() if found}
    _plot(path, "streams at once", {"tokens/s together": lines})


def _draw_growth(path: Path, rounds: list[dict[str, dict[str, float]]], axis: str) -> None:
    panels = {}
    for kind, about in KINDS.items():
        start = f"growth_{axis}_{kind}_"
        steps = [int(key.removeprefix(start)) for key in rounds[0][OURS] if key.startswith(start)]
        panels[about] = {OURS: {n: median(values(rounds, OURS, f"{start}{n}")) for n in steps}}
    _plot(path, AXES[axis], panels)


def _plot(path: Path, along: str, panels: Mapping[str, Mapping[str, Mapping[int, float]]]) -> None:
    """A panel for each thing that is told, with a line for each server."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 3.5 * len(panels), 3.5), layout="constrained")
    for axes, (about, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, line in lines.items():
            if line:
                axes.plot([*line], [*line.values()], marker="o", label=name)
        most = max((value for line in lines.values() for value in line.values()), default=1.0)
        axes.set(xlabel=along, ylabel=about, xlim=(0, None), ylim=(0, 1.1 * most))
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    figure.savefig(path, metadata={"Date": None})
    if path.stat().st_size > MAX_PICTURE_BYTES:
        path.unlink()
        raise ValueError(f"{path.name} is too large for the repository")
