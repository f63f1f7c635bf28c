"""dsv3 serve: a model behind the OpenAI API."""

import os
from pathlib import Path
from typing import Annotated

import typer

from dsv3.cli.generate import Device, ModelArgument, Threads, Weights
from dsv3.config import EngineConfig, ExpertRanksConfig, JoinConfig, ServerConfig
from dsv3.config.address import read_address
from dsv3.errors import ConfigError, MissingExtraError

KEY_VARIABLE = "DSV3_API_KEY"
"""Holds a key, for those who would rather not have a file."""
SECRET_VARIABLE = "DSV3_SECRET"
"""Holds the secret of --secret-file."""
OF_A_MACHINE = frozenset(
    {"model", "join", "prefill", "decode", "address", "secret_file", "join_timeout", "device", "threads"}
)
"""What a machine that joins says itself; all else is its server's to say."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("serve")(serve)


def serve(
    context: typer.Context,
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"Keys, one a line; {KEY_VARIABLE} may hold one too.")
    ] = None,
    served_name: Annotated[str, typer.Option(help="What the model is called; its folder's name when left out.")] = "",
    weights: Weights = "auto",
    device: Device = "auto",
    threads: Threads = 0,
    drafts: Annotated[int, typer.Option(min=0, help="Tokens that MTP drafts ahead at most, where it pays.")] = 0,
    adaptive: Annotated[
        bool, typer.Option("--adaptive-drafts/--no-adaptive-drafts", help="Draft fewer where it does not pay.")
    ] = True,
    cache_tokens: Annotated[
        int | None, typer.Option(min=1, help="Room for all requests together; what memory allows when left out.")
    ] = None,
    page_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one page of the cache.")] = 64,
    prefix_caching: Annotated[
        bool, typer.Option("--prefix-caching/--no-prefix-caching", help="Keep what prompts begin with.")
    ] = True,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one pass; longer prompts go in chunks.")] = 512,
    max_sequences: Annotated[int, typer.Option(min=1, help="Requests in one pass.")] = 64,
    prefill: Annotated[
        int, typer.Option(min=0, help="Processes that read prompts; with --decode. 0: one process does everything.")
    ] = 0,
    decode: Annotated[int, typer.Option(min=0, help="Processes that go on with what those have read.")] = 0,
    workers_at: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Have them from other machines, which join here; none runs here.")
    ] = "",
    join: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Be such a machine: bring --prefill and --decode workers there.")
    ] = "",
    address: Annotated[
        str, typer.Option(metavar="HOST", help="With --join: this machine as the others reach it, if not as it seems.")
    ] = "",
    secret_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"By which machines know each other; or {SECRET_VARIABLE}.")
    ] = None,
    join_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for these machines, or for their server, to be there at first.")
    ] = 600.0,
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="Spread the experts over the processes of each kind.")
    ] = False,
    redundant_experts: Annotated[
        int, typer.Option(min=0, help="With it: copies of busy experts in each layer, all processes together.")
    ] = 0,
    rebalance_seconds: Annotated[
        float, typer.Option(min=0, help="With it: time between two looks at which experts are busy; 0: none.")
    ] = 0.0,
    worker_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a word from such a process before it is started again.")
    ] = 60.0,
    transfer_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for pages from one to the other.")] = 30.0,
    max_tokens_default: Annotated[int, typer.Option(min=1, help="Of answers that do not say.")] = 1024,
    queue_limit: Annotated[int, typer.Option(min=1, help="Answers under way; more are turned away (429).")] = 256,
    queue_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to the first token at most.")] = 60.0,
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to the last token at most.")] = 600.0,
    slow_reader: Annotated[float, typer.Option(min=0.1, help="Seconds for a client to take what is sent.")] = 30.0,
    body_limit_mb: Annotated[float, typer.Option(min=0.001, help="Largest body.")] = 8.0,
    body_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a client to send a body.")] = 30.0,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds for answers to end when told to stop.")] = 30.0,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of web pages that may ask; may be given several times.")
    ] = None,
) -> None:
    """Serve a model: the OpenAI API under /v1, a chat page at /, /health and /metrics."""
    try:
        from dsv3.serve.joining import join as bring
        from dsv3.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise MissingExtraError(package=str(error.name), extra="serve", purpose="dsv3 serve") from error

    if join:
        _refuse_with_join(context)
        bring(
            JoinConfig(
                model=str(model),
                server=read_address(join, option="--join"),
                secret=secret_from(secret_file),
                prefill_workers=prefill,
                decode_workers=decode,
                host=address,
                device=device,
                threads=threads,
                join_timeout_seconds=join_timeout,
            ),
            say=typer.echo,
        )
        return
    if not workers_at and (address or secret_file or _is_given(context, "join_timeout")):
        raise ConfigError(
            "--address, --secret-file and --join-timeout are for --join and --workers-at; give one of these"
        )
    if address:
        raise ConfigError("--address is for a machine that joins; write where to listen into --workers-at HOST:PORT")
    config = ServerConfig(
        model=str(model),
        weights=weights,
        device=device,
        threads=threads,
        cache_tokens=cache_tokens,
        engine=EngineConfig(
            page_tokens=page_tokens,
            max_step_tokens=max_step_tokens,
            max_sequences=max_sequences,
            prefix_caching=prefix_caching,
            max_drafts=drafts,
            adaptive_drafts=adaptive,
        ),
        prefill_workers=prefill,
        decode_workers=decode,
        expert_parallel=expert_parallel,
        expert_ranks=ExpertRanksConfig(redundant_experts=redundant_experts, rebalance_seconds=rebalance_seconds),
        workers_at=workers_at,
        secret=secret_from(secret_file) if workers_at else "",
        join_timeout_seconds=join_timeout,
        worker_timeout_seconds=worker_timeout,
        transfer_timeout_seconds=transfer_timeout,
        host=host,
        port=port,
        served_name=served_name,
        api_keys=keys_from(api_key_file),
        cors_origins=tuple(cors_origin or ()),
        max_tokens_default=max_tokens_default,
        queue_limit=queue_limit,
        queue_timeout_seconds=queue_timeout,
        request_timeout_seconds=request_timeout,
        slow_reader_seconds=slow_reader,
        body_limit_bytes=int(body_limit_mb * 2**20),
        body_timeout_seconds=body_timeout,
        drain_timeout_seconds=drain_timeout,
    )
    run(config, say=typer.echo)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _refuse_with_join(context: typer.Context) -> None:
    """Refuse what a machine that joins has no say in.

    Raises:
        ConfigError: something of it was given.
    """
    if given := [name for name in context.params if name not in OF_A_MACHINE and _is_given(context, name)]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{options} is the server's to say, and not of a machine that joins; leave it out here")


def secret_from(file: Path | None) -> str:
    """Return the secret of a file, or else of the environment; empty where there is none.

    Raises:
        ConfigError: there is no such file.
    """
    if file is None:
        return os.environ.get(SECRET_VARIABLE, "").strip()
    if not file.is_file():
        raise ConfigError(f"--secret-file {file}: there is no such file; make it with: openssl rand -hex 32 > {file}")
    return file.read_text(encoding="utf-8").strip()


def keys_from(file: Path | None) -> tuple[str, ...]:
    """Return the keys of a file and of the environment.

    Raises:
        ConfigError: the file has none.
    """
    keys = [os.environ[KEY_VARIABLE]] if os.environ.get(KEY_VARIABLE) else []
    if file is not None:
        if not file.is_file():
            raise ConfigError(f"--api-key-file {file}: there is no such file")
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not found:
            raise ConfigError(f"--api-key-file {file} holds no key; write one a line, or leave the option out")
        keys += found
    return tuple(keys)
