"""The load itself: users who wait for their answers, or arrivals that wait for nobody."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from dsv3.errors import ConfigError
from dsv3.serve.load.arrivals import poisson_arrivals
from dsv3.serve.load.client import Client, Clock, first_model, open_client, send, start_clock
from dsv3.serve.load.measure import Outcome
from dsv3.serve.load.workload import ENDPOINTS, LoadConfig, Prompt, make_prompts

MAX_IN_FLIGHT = 2000
"""Requests of an open loop that are under way at most. Later ones are sent late, which their latency includes."""
CALIBRATION_CHARACTERS = 400
"""Text that is sent once to learn how long a token is; it fits the context of small models too."""
ASSUMED_CHARACTERS_PER_TOKEN = 4.0
"""Where the server does not count tokens."""

Ask = Callable[[Prompt, float], Coroutine[Any, Any, Outcome]]
"""Send a prompt that was scheduled for a time."""


async def run_load(
    config: LoadConfig, *, url: str, text: str, outcomes: list[Outcome], api_key: str = "", on_end: Callable[[], None]
) -> None:
    """Load a server, and add what came of each request to `outcomes` as it ends.

    Given a list, so that what was measured is there even if the load is interrupted. `on_end` is called after each.

    Raises:
        ConfigError: the server cannot be reached, or refuses the first request.
        DataError: the text is too short.
    """
    async with open_client(url, api_key=api_key) as client:
        model = config.model or await first_model(client)
        characters_per_token = await warm_up(client, config=config, model=model, text=text)
        prompts = iter(make_prompts(config, text=text, characters_per_token=characters_per_token))
        clock = start_clock()

        async def ask(prompt: Prompt, scheduled: float) -> Outcome:
            outcome = await send(
                client,
                path=ENDPOINTS[config.endpoint],
                body=prompt.body(config, model=model),
                scheduled=scheduled,
                clock=clock,
                timeout_seconds=config.timeout_seconds,
            )
            outcomes.append(outcome)
            on_end()
            return outcome

        loop = open_loop if config.rate else closed_loop
        await loop(config, prompts=prompts, ask=ask, clock=clock)


async def closed_loop(config: LoadConfig, *, prompts: Iterator[Prompt], ask: Ask, clock: Clock) -> None:
    """Let `clients` users ask one after another; each sends the next prompt when its last one is answered."""

    async def user() -> None:
        for prompt in prompts:
            if config.duration_seconds is not None and clock() >= config.duration_seconds:
                return
            await ask(prompt, clock())
            if (task := asyncio.current_task()) and task.cancelling():
                return  # A request has taken the cancellation for itself.

    async with asyncio.TaskGroup() as group:
        for _ in range(min(config.clients, config.num_requests)):
            group.create_task(user())


async def open_loop(config: LoadConfig, *, prompts: Iterator[Prompt], ask: Ask, clock: Clock) -> None:
    """Send requests at the times of a Poisson process, whatever has become of those before."""
    room = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def visit(prompt: Prompt, scheduled: float) -> None:
        try:
            await ask(prompt, scheduled)
        finally:
            room.release()

    async with asyncio.TaskGroup() as group:
        for scheduled, prompt in zip(poisson_arrivals(config.rate, seed=config.seed), prompts, strict=False):
            if config.duration_seconds is not None and scheduled >= config.duration_seconds:
                return
            await asyncio.sleep(max(scheduled - clock(), 0.0))
            await room.acquire()
            group.create_task(visit(prompt, scheduled))


async def warm_up(client: Client, *, config: LoadConfig, model: str, text: str) -> float:
    """Send the first requests, which are not counted, and return how many characters a token of the text has.

    Raises:
        ConfigError: such a request is not answered; nothing else would be either.
    """
    characters_per_token = ASSUMED_CHARACTERS_PER_TOKEN
    sample = text[:CALIBRATION_CHARACTERS]
    for number in range(max(config.warmup_requests, 1)):
        outcome = await send(
            client,
            path=ENDPOINTS[config.endpoint],
            body=Prompt(text=sample, max_tokens=2, seed=number).body(config, model=model),
            scheduled=0.0,
            clock=start_clock(),
            timeout_seconds=config.timeout_seconds,
        )
        if outcome.error:
            raise ConfigError(f"{client.base_url} does not answer a first request: {outcome.error}: {outcome.detail}")
        if outcome.prompt_tokens:
            characters_per_token = len(sample) / outcome.prompt_tokens
    return characters_per_token
