"""Replies that are a list of blocks (thoughts, text, calls), and the events that tell of it."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import Request
from starlette.responses import Response

from api import generation, turn
from api.deps import Services, while_connected
from api.errors import client_names
from api.messages_request import MessagesRequest
from api.responses_request import ResponsesRequest
from api.sse import Form, Started, begun, event
from chat.events import CallArguments, CallBegin, Event, Text
from engine import wire
from tier import Tier

Data = dict[str, Any]


class BlockReply(ABC):
    """A reply as it grows, block by block. A subclass keeps it, and tells what happens to it in the
    events of its format; without readers of these it is a whole reply."""

    _started: turn.Turn  # from `begin` on

    def __init__(self, whole: Data) -> None:
        self.whole = whole  # at the end
        self._kind: type[Event] | None = None  # of the open block

    @abstractmethod
    def begin(self) -> Iterable[Data]: ...

    @abstractmethod
    def open(self, first: Event) -> Iterable[Data]:
        """A block begins, of which this is the first event. Its text is added later."""

    @abstractmethod
    def add(self, text: str, logprobs: Sequence[wire.TokenLogprob]) -> Iterable[Data]:
        """More of the open block: its text, or the arguments of its call."""

    @abstractmethod
    def close(self, *, is_whole: bool) -> Iterable[Data]:
        """No more comes of the open block."""

    @abstractmethod
    def end(self, end: turn.End) -> Iterable[Data]: ...

    async def answer(
        self,
        body: MessagesRequest | ResponsesRequest,
        request: Request,
        services: Services,
        tier: Tier,
        headers: Mapping[str, str],
        form: Form,
    ) -> Response:
        """The reply to a request, whole or as it comes, with the headers that are known before.
        Raises ClientLeft or ServiceError."""
        watch, names = generation.Watch(tier), body.names

        async def start() -> turn.Turn:
            with client_names(names):
                return await turn.start(request, services, tier, body.chat(), watch)

        async def stream() -> Started:
            started = await start()
            return self._stream(started), started.headers(headers, names)

        if body.stream:
            return await begun(
                stream(), form, waits_for=watch, headers=headers,
                comment_after_s=services.settings.server.comment_after_s,
            )  # fmt: skip
        started = await start()
        await while_connected(request.receive, self._finish(started))
        content = msgspec.json.encode(self.whole)
        headers = started.whole_headers(headers, names)
        return Response(content, media_type="application/json", headers=headers)

    async def _finish(self, started: turn.Turn) -> None:
        async with aclosing(self._events(started)) as events:
            async for _ in events:
                pass

    async def _stream(self, started: turn.Turn) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._events(started)) as events:
            async for data in events:
                yield event(data)

    async def _events(self, started: turn.Turn) -> AsyncGenerator[Data, None]:
        self._started = started
        async with aclosing(started.outs()) as outs:
            for data in self.begin():
                yield data
            async for out in outs:
                for data in self._read(out):
                    yield data

    def _read(self, out: turn.Out) -> Iterable[Data]:
        logprobs = out.logprobs  # which go with the first text
        for said in out.events:
            is_call = isinstance(said, CallBegin)
            kind = CallArguments if is_call else type(said)
            if is_call or kind is not self._kind:
                yield from self._close(is_whole=True)
                self._kind = kind
                yield from self.open(said)
            if isinstance(said, Text):
                yield from self.add(said.text, logprobs)
                logprobs = ()
            elif not isinstance(said, CallBegin):
                yield from self.add(said.text, ())
        if out.end:
            yield from self._close(is_whole=out.end.finish != "length")
            yield from self.end(out.end)

    def _close(self, *, is_whole: bool) -> Iterable[Data]:
        if self._kind is not None:
            yield from self.close(is_whole=is_whole)
