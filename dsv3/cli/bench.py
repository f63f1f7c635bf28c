"""dsv3 bench: measure what is running."""

import asyncio
import shlex
from contextlib import nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv3.cli.group import add_group
from dsv3.errors import ConfigError
from dsv3.runtime.log import get_logger

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from dsv3.serve.load import LoadConfig, Outcome

log = get_logger(__name__)

DEFAULT_REQUESTS = 100
MOST_REQUESTS = 10_000
"""Where only a duration is given."""


class Endpoint(StrEnum):
    """Which of the server's two ways to generate text is loaded."""

    COMPLETIONS = "completions"
    CHAT = "chat"


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    add_group(app, name="bench", told="Measure what is running.").command("serve")(serve)


def serve(
    target: Annotated[
        str, typer.Argument(metavar="URL|MODEL", help="A server's address, or a model to start a server for.")
    ],
    clients: Annotated[
        int,
        typer.Option(
            min=0, help="Closed loop: users who ask again when they are answered. [default: 8]", show_default=False
        ),
    ] = 0,
    rate: Annotated[
        float,
        typer.Option(
            min=0, help="Open loop: requests a second by a Poisson process, answered or not.", show_default=False
        ),
    ] = 0.0,
    requests: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Requests at most. [default: 100]", show_default=False)
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds after which no request begins.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which an answer counts as lost.")] = 300.0,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before the clock starts; there is always one.")] = 1,
    prompt_tokens: Annotated[
        str, typer.Option(help="Length of prompts: 256, 64-512 (even), or lognormal:MEDIAN:SIGMA.")
    ] = "256",
    output_tokens: Annotated[str, typer.Option(help="Length of answers at most, in the same forms.")] = "128",
    shared_prefix_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens before each prompt that its whole group shares.")
    ] = 0,
    prefix_groups: Annotated[int, typer.Option(min=1, help="Groups that share a prefix each.")] = 1,
    text: Annotated[
        Path | None, typer.Option(help="Text that prompts are cut from. [default: Python's language reference]")
    ] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="completions continues text; chat asks in the chat format.")] = (
        Endpoint.COMPLETIONS
    ),
    model: Annotated[str, typer.Option(help="Name to ask for; the server's first one when left out.")] = "",
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of texts, lengths, arrivals and sampling.")] = 0,
    ignore_end: Annotated[
        bool, typer.Option("--ignore-end", help="Ask for answers that go on past the end token, to their full length.")
    ] = False,
    api_key: Annotated[
        str, typer.Option(envvar="DSV3_API_KEY", help="Key of the server; better given in the environment.")
    ] = "",
    serve_options: Annotated[
        str, typer.Option(help="Options for the server that is started, in one text: '--weights int8'.")
    ] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all measurements to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw distributions and a timeline into this PNG file.")] = None,
) -> None:
    """Load a server and measure it: time to the first token, time per token, throughput, errors.

    Prompts are real text. Latencies count from when a request was to be sent, so that an overloaded server cannot hide
    the waits it causes.
    """
    from dsv3.serve.load import LoadConfig
    from dsv3.serve.load.lengths import parse_lengths
    from dsv3.serve.load.workload import read_text

    config = LoadConfig(
        clients=clients if clients or rate else 8,
        rate=rate,
        num_requests=requests or (DEFAULT_REQUESTS if duration is None else MOST_REQUESTS),
        duration_seconds=duration,
        timeout_seconds=timeout,
        warmup_requests=warmup,
        prompt_tokens=parse_lengths(prompt_tokens, option="--prompt-tokens"),
        output_tokens=parse_lengths(output_tokens, option="--output-tokens"),
        shared_prefix_tokens=shared_prefix_tokens,
        prefix_groups=prefix_groups,
        endpoint=str(endpoint),
        model=model,
        temperature=temperature,
        seed=seed,
        ignore_end=ignore_end,
    )
    source = read_text(text)
    with server_at(target, options=serve_options) as url:
        outcomes, is_interrupted = measure(config, url=url, text=source, api_key=api_key)
    show(outcomes)
    if json_file:
        write_measurements(json_file, config=config, outcomes=outcomes, target=target)
    if picture:
        from dsv3.serve.load.picture import save_picture

        save_picture(picture, outcomes=outcomes, title=f"{target}: {load_words(config)}")
    if is_interrupted:
        raise KeyboardInterrupt


def server_at(target: str, *, options: str) -> "AbstractContextManager[str]":
    """Return the address to load: the one given, or that of a server which runs as long as it is loaded."""
    from dsv3.serve.load.started import started_server

    if target.startswith(("http://", "https://")):
        if options:
            raise ConfigError(f"--serve-options are for a server that is started; {target} runs already")
        return nullcontext(target.rstrip("/").removesuffix("/v1"))
    if not Path(target).exists():
        raise ConfigError(f"{target} is neither a folder nor an address; an address begins with http:// or https://")
    return started_server(target, options=shlex.split(options))


def measure(config: "LoadConfig", *, url: str, text: str, api_key: str) -> "tuple[list[Outcome], bool]":
    """Load a server, and return what came of each request and whether Ctrl-C ended it early."""
    from rich.console import Console
    from rich.progress import Progress

    from dsv3.serve.load import run_load

    outcomes: list[Outcome] = []
    log.info("loading %s: %s", url, load_words(config))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("requests", total=config.num_requests)
        load = run_load(
            config, url=url, text=text, outcomes=outcomes, api_key=api_key, on_end=lambda: progress.advance(bar)
        )
        try:
            asyncio.run(load)
        except KeyboardInterrupt:
            return outcomes, True
    return outcomes, False


def load_words(config: "LoadConfig") -> str:
    """Say what kind of load it is."""
    if config.rate:
        return f"{config.rate:g} requests/s at random times"
    return f"{config.clients} client{'' if config.clients == 1 else 's'} at once"


def show(outcomes: "list[Outcome]") -> None:
    """Print the table."""
    from rich.console import Console

    from dsv3.serve.load import summarise
    from dsv3.serve.load.table import render

    Console(highlight=False, soft_wrap=True).print(render(summarise(outcomes)))
    details = {outcome.error: outcome.detail for outcome in outcomes if outcome.error}
    for kind, detail in details.items():
        log.warning("%s: %s", kind, detail)


def write_measurements(path: Path, *, config: "LoadConfig", outcomes: "list[Outcome]", target: str) -> None:
    """Write settings, summary and every request."""
    from dsv3.runtime.atomic import write_json
    from dsv3.serve.load import summarise

    content: dict[str, Any] = {
        "target": target,
        "settings": asdict(config),
        "summary": summarise(outcomes).as_dict(),
        "requests": [asdict(outcome) for outcome in outcomes],
    }
    write_json(content, path=path)
