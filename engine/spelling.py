"""Writes bytes with ordinary tokens, where a tokenizer would put others into them."""

from collections.abc import Callable, Iterable


class Spelling:
    """By the pieces of these tokens; of equal pieces the first one's counts."""

    def __init__(self, tokens: Iterable[int], piece: Callable[[int], bytes]) -> None:
        self._ids: dict[bytes, int] = {}
        for token in tokens:
            self._ids.setdefault(piece(token), token)
        self._longest = max(map(len, self._ids), default=0)

    def spell(self, data: bytes) -> list[int]:
        """Ids whose pieces join to exactly `data`, longest first. Raises ValueError where there are
        none."""
        ids, at = [], 0
        while at < len(data):
            ends = range(min(at + self._longest, len(data)), at, -1)
            end = next((end for end in ends if data[at:end] in self._ids), at)
            if end == at:
                raise ValueError(f"the vocabulary has no token for {data[at : at + 1]!r}")
            ids.append(self._ids[data[at:end]])
            at = end
        return ids
