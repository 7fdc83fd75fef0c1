"""What is certainly too long for a model, found without tokenising, which would keep its worker
busy for nothing; and for a reply."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from engine import wire
from errors import BadRequest, ContextLengthExceeded

_COUNTS_FOR_NOTHING = re.compile(r"\W+")  # for some tokenizers: spaces, accents, hidden hyphens
MOST_TO_CUT = 16  # times the longest text that could fit: all of it is tokenised before the cut


def check_colbert(n_numbers: int, most: int | None) -> None:
    """Of all ColBERT vectors of a reply. Raises BadRequest."""
    if most is not None and n_numbers > most:
        raise BadRequest(
            f"The ColBERT vectors of these texts have more than {most:,} numbers, the most that a "
            "reply has in this form. Send fewer texts at once, or take them as base64, which may "
            "have more.",
            param="encoding_format",
        )


@dataclass(frozen=True, slots=True)
class Lengths:
    """What a tier's model takes."""

    tier: str
    n_ctx: int  # tokens of one request
    max_token_bytes: int  # no token stands for more of a text

    def least_tokens(self, prompt: Sequence[wire.Segment | int]) -> int:
        """So many tokens a prompt has at least."""
        n_bytes = sum(len(p.text.encode()) for p in prompt if isinstance(p, wire.Segment))
        n_ids = sum(isinstance(piece, int) for piece in prompt)
        return n_ids + n_bytes // self.max_token_bytes

    def check_prompt(self, prompt: Sequence[wire.Segment | int]) -> None:
        """Raises ContextLengthExceeded."""
        n_tokens = self.least_tokens(prompt)
        if n_tokens > self.n_ctx:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.n_ctx} tokens with the answer "
                f"({self.tier.upper()}_N_CTX); the prompt has more than {n_tokens}.",
                param="prompt",
                n_prompt_tokens=n_tokens,
                n_ctx=self.n_ctx,
            )

    def check_texts(self, request: wire.Embed | wire.Score) -> None:
        """The same for texts, of which only letters and digits are sure to count. Raises
        BadRequest."""
        fields: dict[str, Sequence[str | list[int]]]
        if isinstance(request, wire.Embed):
            fields = {"input": request.inputs}
        else:
            fields = {"query": request.queries, "documents": request.documents}
        for what, texts in fields.items():
            for index, text in enumerate(texts):
                self._check_text(text, what, index, may_cut=request.truncate != "none")

    def _check_text(self, text: str | list[int], what: str, index: int, *, may_cut: bool) -> None:
        least = len(text)
        if isinstance(text, str):
            least //= 4 * self.max_token_bytes
            if least > self.n_ctx and not may_cut:  # this takes a while
                least = len(_COUNTS_FOR_NOTHING.sub("", text)) // (4 * self.max_token_bytes)
        if least > self.n_ctx and not may_cut:
            raise ContextLengthExceeded(
                f"{what}[{index}] is too long: this model's maximum context length is {self.n_ctx} "
                f"tokens, it has more than {least} ({self.tier.upper()}_N_CTX).",
                param=what,
                n_prompt_tokens=least,
                n_ctx=self.n_ctx,
                index=index,
            )
        if len(text) > MOST_TO_CUT * self.n_ctx * self.max_token_bytes:
            raise BadRequest(
                f"{what}[{index}] has {len(text):,} characters, which is too much even to "
                f"be cut to {self.n_ctx:,} tokens.",
                param=what,
                index=index,
            )
