"""The command line of what makes a directory of a GGUF."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from errors import ModelLoadFailed


def run(about: str | None, convert: Callable[[Path, Path], None]) -> None:
    """Ends with the sentence where `convert` raises ModelLoadFailed."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", type=Path, help="the model")
    parser.add_argument("out", type=Path, help="the directory to write")
    arguments = parser.parse_args()
    try:
        convert(arguments.gguf, arguments.out)
    except ModelLoadFailed as error:
        sys.exit(error.message)
