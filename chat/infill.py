"""Filling in the middle: the prompt of what stands before and after, by the model's own tokens."""

from collections.abc import Iterable

from engine.wire import Segment

# What marks the text before, the text after, and the place to fill. All of these models were
# trained to read them in this order; llama.cpp knows the same names (llama-vocab.cpp).
FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma, Granite 4
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite Code, Stable Code
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("<|prefix|>", "<|suffix|>", "<|middle|>"),  # Falcon
)

Marks = tuple[str, str, str]


def marks_of(control_tokens: Iterable[str]) -> Marks | None:
    """The marks that a model was trained with; None where it was not."""
    known = set(control_tokens)
    return next((marks for marks in FAMILIES if known.issuperset(marks)), None)


def infill(before: str, after: str, marks: Marks) -> list[Segment]:
    """The prompt to fill what is missing between two texts, in which no control token is obeyed."""
    first, second, last = marks
    segments = [
        Segment(first, parse_special=True),
        Segment(before, parse_special=False),
        Segment(second, parse_special=True),
        Segment(after, parse_special=False),
        Segment(last, parse_special=True),
    ]
    return [segment for segment in segments if segment.text]
