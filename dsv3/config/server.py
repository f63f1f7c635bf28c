"""Settings of the HTTP server; those of the engine behind it are in `engine.py`."""

from dataclasses import dataclass, field

from dsv3.config.address import Address, read_address
from dsv3.config.check import require_not_negative, require_positive
from dsv3.config.engine import EngineConfig
from dsv3.config.expert_ranks import ExpertRanksConfig
from dsv3.errors import ConfigError

SHORTEST_SECRET = 16
FORMATS_OVER_RANKS = ("auto", "fp32", "bf16")
"""Weights of experts that may lie on several ranks."""


def require_secret(secret: str) -> None:
    """Refuse a secret that can be guessed.

    Raises:
        ConfigError: it is empty or short.
    """
    if len(secret) < SHORTEST_SECRET:
        raise ConfigError(
            f"machines know each other by a secret of {SHORTEST_SECRET} characters or more, and there "
            f"{f'are {len(secret)}' if secret else 'is none'}; make a file with: openssl rand -hex 32 > FILE, and give "
            "all of them --secret-file FILE"
        )


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """What a machine brings to a server that runs on another one, which says all the rest."""

    model: str
    """Folder of the model on this machine; the same files as the server's."""
    server: Address
    secret: str = field(repr=False)
    prefill_workers: int = 0
    """Processes that read prompts."""
    decode_workers: int = 0
    """Processes that go on from there."""
    host: str = ""
    """This machine as the others reach it; empty takes its address in the network that leads to the server."""
    device: str = "auto"
    threads: int = 0
    """Of each worker; 0 divides the cores among them."""
    join_timeout_seconds: float = 600.0
    """Longest time for the server to be reached, which may begin later."""

    def __post_init__(self) -> None:
        require_not_negative(self, "threads", "prefill_workers", "decode_workers")
        require_positive(self, "join_timeout_seconds")
        if not self.prefill_workers + self.decode_workers:
            raise ConfigError(f"--join {self.server} brings no workers; say how many: --prefill P, --decode D or both")
        require_secret(self.secret)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What is served, to whom, and within which limits."""

    model: str
    """Folder of the model."""
    weights: str = "auto"
    device: str = "auto"
    threads: int = 0
    cache_tokens: int | None = None
    """Room for all requests together; None takes `loaded.CACHE_TOKENS`, a whole context, or what memory allows."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """`num_pages` is worked out from `cache_tokens`."""
    prefill_workers: int = 0
    """Processes that read prompts, and hand them over; 0, with 0 `decode_workers`, is one process for everything."""
    decode_workers: int = 0
    """Processes that go on from there."""
    expert_parallel: bool = False
    """Spread the routed experts over the workers of each kind, which then begin and end together."""
    expert_ranks: ExpertRanksConfig = field(default_factory=ExpertRanksConfig)
    """`fixed_step_tokens` is worked out: as many as one step of a worker that decodes has, none where prompts are
    read."""
    workers_at: str = ""
    """HOST:PORT where other machines bring the workers; empty starts them here."""
    secret: str = field(default="", repr=False)
    """That these machines know, too."""
    join_timeout_seconds: float = 600.0
    """Longest wait for the workers of other machines when the server begins."""
    worker_timeout_seconds: float = 60.0
    """A worker that says nothing for so long is ended and started again; longer than any step takes."""
    transfer_timeout_seconds: float = 30.0
    """Longest time from a first token until all pages are where the answer goes on."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    served_name: str = ""
    """What the model is called in the API; the folder's name when empty."""
    api_keys: tuple[str, ...] = ()
    """One of them must come with every request to /v1; none asks for none."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of other origins that may ask; by default none may."""
    max_tokens_default: int = 1024
    """Tokens of an answer whose request does not say."""
    max_choices: int = 16
    """Largest n, and most prompts of one request."""
    queue_limit: int = 256
    """Answers under way, waiting ones among them; more are turned away with 429."""
    queue_timeout_seconds: float = 60.0
    """Longest wait for the first token."""
    request_timeout_seconds: float = 600.0
    """Longest time from a request to its last token."""
    slow_reader_seconds: float = 30.0
    """Longest time for a client to take what is written to it."""
    keep_alive_seconds: float = 5.0
    """After so long without a token, a comment is sent on a stream."""
    body_timeout_seconds: float = 30.0
    """Longest time for a client to send the body of a request."""
    body_limit_bytes: int = 8 * 1024 * 1024
    drain_timeout_seconds: float = 30.0
    """Time that answers have to end when the server is told to."""

    def __post_init__(self) -> None:
        require_positive(self, "max_tokens_default", "max_choices", "queue_limit", "body_limit_bytes")
        require_positive(self, "queue_timeout_seconds", "request_timeout_seconds", "slow_reader_seconds")
        require_positive(self, "keep_alive_seconds", "body_timeout_seconds")
        require_positive(self, "worker_timeout_seconds", "transfer_timeout_seconds", "join_timeout_seconds")
        require_not_negative(self, "port", "drain_timeout_seconds", "threads", "prefill_workers", "decode_workers")
        if bool(self.prefill_workers) != bool(self.decode_workers):
            raise ConfigError(
                f"{self.prefill_workers} prefill workers and {self.decode_workers} decode workers: one kind cannot "
                "answer alone; give both 1 or more, or both 0 for one process that does everything"
            )
        self._require_machines()
        self._require_expert_ranks()

    def _require_machines(self) -> None:
        if not self.workers_at:
            return
        read_address(self.workers_at, option="--workers-at")
        if not self.prefill_workers:
            raise ConfigError("--workers-at takes workers of other machines; say how many: --prefill P --decode D")
        require_secret(self.secret)

    def _require_expert_ranks(self) -> None:
        if not self.expert_parallel:
            if self.expert_ranks != ExpertRanksConfig():
                raise ConfigError(
                    "redundant experts, and experts that move, are for experts spread over processes; add "
                    "--expert-parallel"
                )
            return
        if max(self.prefill_workers, self.decode_workers) < 2:
            raise ConfigError(
                f"experts cannot be spread over {self.prefill_workers} prefill and {self.decode_workers} decode "
                "workers; give 2 or more of one kind, such as --prefill 1 --decode 2"
            )
        if self.weights not in FORMATS_OVER_RANKS:
            raise ConfigError(
                f"weights = {self.weights!r} cannot be spread over processes yet; use one of "
                f"{', '.join(map(repr, FORMATS_OVER_RANKS))}"
            )
        if self.device not in ("auto", "cpu"):
            raise ConfigError(
                f"device = {self.device!r}: experts over processes were run on CPUs alone so far; use device = 'cpu'"
            )
