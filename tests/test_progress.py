"""How far loads and downloads are: in one line of a terminal, or now and then in the log."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from progress import DRAW_PERIOD_S, LOG_PERIOD_S, ProgressLine, ProgressLog
from settings import ROOT
from tests.serving import script


def test_the_log_has_a_line_each_period_and_none_of_what_is_short(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    log = ProgressLog()
    for tenth in range(25):
        log.tell("light", f"loading light {tenth}%", 100 + LOG_PERIOD_S * tenth / 10)
    log.tell("heavy", "loading heavy 0%", 200)
    log.tell("heavy", "loading heavy 99%", 200 + LOG_PERIOD_S / 2)
    log.end("heavy")
    log.tell("heavy", "loading heavy 0%", 200 + LOG_PERIOD_S)
    assert caplog.messages == ["Loading light 10%", "Loading light 20%"]


def test_a_terminal_has_one_line_that_is_drawn_a_few_times_per_second() -> None:
    terminal = io.StringIO()
    line = ProgressLine(terminal)
    for percent in range(100):
        line.tell("light", f"loading light {percent}%", 100 + DRAW_PERIOD_S * percent / 50)
    line.tell("heavy", "downloading heavy 3%", 100 + 2 * DRAW_PERIOD_S)
    line.end("light")
    line.end("heavy")
    line.end("medium")
    assert terminal.getvalue().split("\x1b[K\r") == [
        "loading light 0%",
        "loading light 50%",
        "loading light 99% · downloading heavy 3%",
        "downloading heavy 3%",
        "",
        "",
    ]


def test_a_terminal_that_has_gone_stops_nothing() -> None:
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise OSError(5, "Input/output error")

    line = ProgressLine(Gone())
    line.tell("light", "loading light 0%", 1)
    line.end("light")


@pytest.mark.parametrize("form", ["text", "json"])
def test_only_people_at_a_terminal_see_the_line(tmp_path: Path, form: str) -> None:
    path = script(tmp_path, load_s=0.1)
    own = {"LIGHT_BACKEND": "fake", "LIGHT_MODEL_PATH": path, "LIGHT_PRELOAD": "true"}
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "server.py"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=terminal,
        env=os.environ | own | {"PORT": "0", "LOG_FORMAT": form},
    )  # fmt: skip
    os.close(terminal)
    try:
        text = ""
        while "ready after" not in text:
            text += os.read(main, 4096).decode()
    finally:
        process.kill()
        process.wait()
        os.close(main)
    assert ("loading light 0%\x1b[K\r" in text) == (form == "text")
    assert ("\x1b" in text) == (form == "text")
