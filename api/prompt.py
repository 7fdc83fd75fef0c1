"""From a conversation to the prompt of a tier's model; what is left out where it is too long."""

import asyncio
from datetime import datetime
from itertools import takewhile

from api.chat_request import ChatRequest, Conversation
from api.deps import Services
from caching import Caching
from chat.format import Prompt
from engine import wire
from errors import UnsupportedParameter
from tier import Tier


def prompt_of(
    services: Services,
    tier: Tier,
    conversation: Conversation,
    answer: wire.GrammarPart | None = None,
) -> Prompt:
    """What the tier's model makes of a conversation; it takes a while. Raises ServiceError.

    A model that does not think is not asked to: clients send an effort to every one. With
    STRICT_PARAMS a bound on its thoughts is a fault.
    """
    conversation.check_content(tier.name)
    tools = conversation.tool_list()
    prompt = services.chat_format(tier).prompt(
        [message.model_dump(exclude_unset=True) for message in conversation.messages],
        now=datetime.now(),
        tools=tools,
        choice=conversation.tool_choice_of(tools),
        answer=answer,
        effort=conversation.reasoning_effort,
        budget=conversation.thinking_budget_tokens,
        continues=conversation.continue_final_message,
        extra=conversation.chat_template_kwargs,
    )
    if services.settings.server.strict_params and "thinking_budget_tokens" in prompt.idle:
        raise UnsupportedParameter("This model does not think.", param="thinking_budget_tokens")
    return prompt


async def n_too_many(services: Services, tier: Tier, body: ChatRequest, caching: Caching) -> int:
    """How many messages must go for the prompt to leave room for an answer: the least that is
    enough, of whole turns from the oldest on. What instructs the model stays, and the last turn,
    even where that is not enough. Raises ServiceError."""
    starts = [n for n, message in enumerate(body.messages) if message.role == "user"]
    n_first = _n_instructions(body)
    options = [0, *(n - n_first for n in starts if n > n_first)]
    n_room = tier.n_ctx - min(_n_answer(tier, body), tier.n_ctx // 2)
    low, high = 0, len(options) - 1
    while low < high:
        middle = (low + high) // 2
        shorter = without_middle(body, options[middle])
        prompt = await asyncio.to_thread(prompt_of, services, tier, shorter)
        n_tokens = tier.least_tokens(prompt.segments)
        if n_tokens <= n_room:
            n_tokens = await services.answers.n_tokens(prompt.segments, tier, caching)
        if n_tokens <= n_room:
            high = middle
        else:
            low = middle + 1
    return options[low]


def without_middle(body: ChatRequest, n_messages: int) -> ChatRequest:
    """The conversation without so many messages after the first instructions."""
    n_first = _n_instructions(body)
    messages = body.messages[:n_first] + body.messages[n_first + n_messages :]
    return body.model_copy(update={"messages": messages})


def _n_instructions(body: ChatRequest) -> int:
    """How many messages at the beginning instruct the model."""
    return len([*takewhile(lambda m: m.role in ("system", "developer"), body.messages)])


def _n_answer(tier: Tier, body: ChatRequest) -> int:
    """Tokens that the answer is to have room for."""
    limits = (body.max_completion_tokens, body.max_tokens, tier.settings.max_tokens)
    return next((limit for limit in limits if limit is not None and limit >= 0), tier.n_ctx // 4)
