"""dsv3 chat: talk with a model in the terminal."""

import secrets
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv3.cli.generate import (
    Average,
    Device,
    Drafts,
    ModelArgument,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    Weights,
    speed_line,
)
from dsv3.errors import ConfigError

if TYPE_CHECKING:
    from dsv3.infer.conversation import Conversation
    from dsv3.infer.loaded import LoadedModel

COMMANDS = "/reset forgets the conversation, /exit leaves; Ctrl-C stops an answer, Ctrl-D leaves"
BASE_NOTE = (
    "This is a base model: it was trained to continue text and not tuned to chat. It goes on from what you write, "
    "so write the beginning of a text rather than a request."
)


class Format(StrEnum):
    """How a conversation is put to the model."""

    AUTO = "auto"
    CHAT = "chat"
    TEXT = "text"


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("chat")(chat)


def chat(
    model: ModelArgument,
    system: Annotated[str, typer.Option(help="Text that stands before the conversation.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one answer at most. [default: 1024; 64 of a base model]")
    ] = None,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    layout: Annotated[
        Format,
        typer.Option("--format", help="Turns in the model's chat format, or as one running text; auto asks the model."),
    ] = Format.AUTO,
    speed: Annotated[bool, typer.Option("--speed", help="Print tokens per second after each answer.")] = False,
    weights: Weights = "auto",
    average: Average = False,
    drafts: Drafts = 0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Talk with a model. Questions are read line by line; answers appear as they are made."""
    from dsv3.infer.conversation import Conversation
    from dsv3.infer.loaded import load, sampling_params
    from dsv3.runtime.device import set_threads

    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "stop": stop or ()}
    first_seed = secrets.randbelow(2**32) if seed is None else seed
    sampling_params(max_tokens=max_tokens, seed=first_seed, **settings)
    set_threads(threads)
    loaded = load(model, weights=weights, device=device, average=average, drafts=drafts)
    as_text = loaded.is_base if layout is Format.AUTO else layout is Format.TEXT
    settings["max_tokens"] = max_tokens or (64 if as_text else 1024)
    conversation = Conversation(loaded, system=system, as_text=as_text)
    greet(loaded, as_text=as_text)
    for turn, question in enumerate(questions(reset=conversation.reset)):
        answer(conversation, question=question, settings={**settings, "seed": first_seed + turn}, speed=speed)


def greet(loaded: "LoadedModel", *, as_text: bool) -> None:
    """Say whom one talks to, how, and what to expect."""
    say(f"{loaded.source}. {COMMANDS}.")
    if loaded.is_base:
        say(BASE_NOTE)
        say(f"It was trained on texts of {loaded.trained_length} tokens; earlier turns are kept as far as they fit.")
    if loaded.is_base and not as_text:
        say("The chat format was asked for; the model has not seen it in training.")


def answer(conversation: "Conversation", *, question: str, settings: dict[str, Any], speed: bool) -> None:
    """Print the answer to one question as it is made, and remember the turn; Ctrl-C ends the answer where it is."""
    pieces: list[str] = []
    try:
        stream = conversation.ask(question, **settings)
    except ConfigError as error:
        say(f"error: {error}; /reset starts a new conversation")
        return
    try:
        for piece in stream:
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print()
        say("[stopped]")
    conversation.remember(question, answer="".join(pieces))
    if speed:
        say(speed_line(stream, seed=settings["seed"]))


def questions(*, reset: Callable[[], None]) -> Iterator[str]:
    """Yield what the user asks, obeying commands on the way, until the input ends or asks to leave."""
    for line in lines():
        command = line.strip()
        if command == "/exit":
            return
        if command == "/reset":
            reset()
            say("The conversation is forgotten.")
        elif line.startswith("/"):
            say(f"There is no command {command.split()[0]}: {COMMANDS}. A text that begins with / needs a space first.")
        elif command:
            yield line


def lines() -> Iterator[str]:
    """Yield lines from a terminal, with a prompt and line editing, or from whatever standard input is."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    import readline  # noqa: F401  gives input() its editing and history

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            say("Ctrl-D or /exit leaves.")


def say(text: str) -> None:
    """Tell the user something that is not the model's: on standard error, so that answers can be piped away."""
    print(text, file=sys.stderr, flush=True)
