"""One turn of a chat: from a request to events. Every chat endpoint folds these."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import Any, Literal

import msgspec
from fastapi import Request

from api import generation
from api.chat_request import ChatRequest
from api.deps import Services, fetched, while_connected
from api.errors import client_name, client_names
from api.fields import with_ignored
from api.prompt import n_too_many, prompt_of, without_middle
from api.sampling import answer_part, generate_request
from chat.events import CallBegin, Event, Message, Splitter, Text
from chat.format import Prompt
from chat.splitter import InlineReasoning
from engine import wire
from tier import Tier

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class End:
    """How one choice ended."""

    finish: FinishReason
    n_tokens: int
    n_reasoning: int  # of them
    is_valid: bool | None  # by the grammar that the client sent
    stop: str | None = None  # the stop string that ended it


@dataclass(frozen=True, slots=True)
class Out:
    """What comes next of one choice, `end` with the last. Log probabilities are of its text."""

    index: int
    events: Sequence[Event]
    logprobs: Sequence[wire.TokenLogprob]
    end: End | None


@dataclass(slots=True)
class Choice:
    """A whole answer."""

    message: Message
    logprobs: list[wire.TokenLogprob]
    end: End


async def start(
    request: Request,
    services: Services,
    tier: Tier,
    body: ChatRequest,
    watch: generation.Watch,
) -> "Turn":
    """Submit a turn and wait until it has started. Raises ClientLeft or ServiceError."""
    body.check_stream_options()
    await fetched(request.receive, tier)
    answer_must = answer_part(body)
    n_left_out = 0
    if body.truncate:
        counting = n_too_many(services, tier, body, services.caching(request))
        with client_names({"^prompt$": "messages"}):
            n_left_out = await while_connected(request.receive, counting)
        body = without_middle(body, n_left_out)
    prompt = await asyncio.to_thread(prompt_of, services, tier, body, answer_must)
    asked = generate_request(
        body,
        tier.settings,
        prompt=prompt.segments,
        limits=(body.max_tokens, body.max_completion_tokens),
        n=body.n,
        n_logprobs=body.n_logprobs,
        grammar=prompt.grammar,
        thinking=prompt.thinking,
        visible=prompt.visible,
        calls=prompt.calls,
    )
    with client_names({"^prompt$": "messages"}):
        answer = await generation.start(request, services, tier, body, [asked], watch)
    is_inline = services.settings.server.reasoning_field == "none"
    return Turn(answer, prompt, n_left_out, is_inline, has_client_grammar=answer_must is not None)


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn that has started. Read it by `outs` or `fold`, once."""

    answer: generation.Answer
    prompt: Prompt
    n_left_out: int  # messages
    is_inline: bool  # its thoughts are in its text
    has_client_grammar: bool

    async def outs(self) -> AsyncGenerator[Out, None]:
        """What each choice says, as it comes. Closing it cancels the rest."""
        readers = [self._reader() for _ in range(self.answer.n_choices)]
        async with aclosing(self.answer.outs) as outs:
            async for index, out in outs:
                yield readers[index].read(index, out)

    async def fold(self) -> list[Choice]:
        """The whole answers, by choice."""
        choices = [Choice(Message(), [], _NO_END) for _ in range(self.answer.n_choices)]
        async with aclosing(self.outs()) as outs:
            async for out in outs:
                choice = choices[out.index]
                for event in out.events:
                    choice.message.add(event)
                choice.logprobs += out.logprobs
                choice.end = out.end or choice.end
        return choices

    def usage(self, ends: Iterable[End]) -> dict[str, Any]:
        """OpenAI's usage object."""
        ends = list(ends)
        n_reasoning = sum(end.n_reasoning for end in ends)
        usage = generation.usage(self.answer, sum(end.n_tokens for end in ends))
        return usage | {"completion_tokens_details": {"reasoning_tokens": n_reasoning}}

    def headers(
        self, known: Mapping[str, str], names: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """What a stream says beside its body, with what was `known` before. `names` has what fields
        are called by the client, if that sent no chat."""
        idle = (*self.prompt.idle, *self.answer.begun.unenforced)
        headers = with_ignored(known, (client_name(param, names or {}) for param in idle))
        headers |= self.answer.headers()
        if self.n_left_out:
            headers["X-Truncated-Messages"] = str(self.n_left_out)
        return headers

    def whole_headers(
        self, known: Mapping[str, str], names: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """What a whole reply says beside its body."""
        return self.headers(known, names) | self.answer.whole_headers()

    def _reader(self) -> "_Reader":
        splitter = self.prompt.splitter()
        shown = InlineReasoning(splitter) if self.is_inline else splitter
        return _Reader(splitter, shown, self.has_client_grammar)


_NO_END = End("stop", 0, 0, None)


@dataclass(slots=True)
class _Reader:
    """Reads one choice."""

    splitter: Splitter
    shown: Splitter  # the same, or around it
    has_client_grammar: bool
    has_calls: bool = False
    n_reasoning: int = 0
    pending: list[wire.TokenLogprob] = field(default_factory=list)  # of text that is held back
    is_begun: bool = False  # text, since there were thoughts or a call

    def read(self, index: int, out: wire.TokenOut) -> Out:
        was_text = self._is_text()
        if self.splitter.is_reasoning:
            self.n_reasoning = out.n_tokens
        events = self.shown.feed(out.text)
        if out.done:
            events += self.shown.finish()
        self.has_calls |= any(isinstance(event, CallBegin) for event in events)
        logprobs = self._logprobs(out, events, was_text)
        if out.done and not self.has_calls and (half := _half_character(self.pending)):
            events, logprobs = [*events, Text("")], half
        return Out(index, events, logprobs, self._end(out.done))

    def _is_text(self) -> bool:
        return not (self.splitter.is_reasoning or self.splitter.is_calling)

    def _logprobs(
        self, out: wire.TokenOut, events: Sequence[Event], was_text: bool
    ) -> list[wire.TokenLogprob]:
        """Those of text: neither of thoughts and calls, nor of the marks around them."""
        if not was_text:
            return []
        self.pending += out.logprobs
        logprobs: list[wire.TokenLogprob] = []
        if any(isinstance(event, Text) for event in events):
            logprobs, self.pending = self.pending, []
            said = "".join(event.text for event in events if isinstance(event, Text))
            if not self.is_begun and said and not said[0].isspace():
                logprobs = _from_text(logprobs)
            self.is_begun |= bool(said)
        if not self._is_text():
            self.pending = []
            self.is_begun = False
        return logprobs

    def _end(self, done: wire.Done | None) -> End | None:
        if done is None:
            return None
        finish: FinishReason = done.finish
        if finish == "stop" and self.has_calls and not self.splitter.is_calling:
            finish = "tool_calls"
        is_answer = self.has_client_grammar and not self.has_calls
        is_valid = done.is_valid if is_answer else None
        return End(finish, done.n_tokens, self.n_reasoning, is_valid, done.stop)


def _from_text(tokens: Iterable[wire.TokenLogprob]) -> list[wire.TokenLogprob]:
    """Without the spaces before it, which are no part of a text behind thoughts."""
    said = [*dropwhile(lambda token: token.text.isspace(), tokens)]
    if said:
        said[0] = msgspec.structs.replace(said[0], text=said[0].text.lstrip())
    return said


def _half_character(tokens: Sequence[wire.TokenLogprob]) -> list[wire.TokenLogprob]:
    """Those at the end that are of a character which is not whole. Its first bytes may have come
    with text."""
    n = next((n for n, one in enumerate(reversed(tokens)) if _is_text(one.token)), len(tokens))
    return [*tokens[len(tokens) - n :]]


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True
