"""How grammars are written: which keywords of a schema hold others, and texts in expressions."""

import re

DEFINITIONS = ("$defs", "definitions")
BY_NAME = {"properties", "patternProperties", "dependentSchemas", *DEFINITIONS}  # hold schemas
DATA = {"const", "enum", "default", "examples"}  # keywords whose values are no schemas


def pattern(text: str) -> str:
    """A text in a regular expression of Lark."""
    return re.sub(r"\W", lambda char: f"\\x{{{ord(char[0]):x}}}", text)
