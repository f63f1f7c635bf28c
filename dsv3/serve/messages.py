"""What the two processes of the server tell each other."""

import msgspec

from dsv3.infer.request import EngineStats, TokenEvent
from dsv3.infer.sampler import SamplingParams
from dsv3.serve.grammar import GrammarSpec


class Ask(msgspec.Struct, tag=True, frozen=True):
    """One text to be continued."""

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    num_logprobs: int | None = None
    prompt_logprobs: bool = False
    grammar: GrammarSpec | None = None
    thinks_first: bool = False
    """The answer begins inside `<think>`; the grammar is for what comes after."""


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Nobody waits for these any more."""

    ids: list[str]


class Check(msgspec.Struct, tag=True, frozen=True):
    """The engine is to check its own books."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    """The engine is to end."""


class Here(msgspec.Struct, tag=True, frozen=True):
    """The engine's process has begun, and loads the model next."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded."""

    context_limit: int
    num_embeddings: int
    """Rows of the embedding: ids of tokens lie below."""
    weights: str
    """How they are kept, in words."""
    drafts: int
    num_pages: int
    page_tokens: int


class Broken(msgspec.Struct, tag=True, frozen=True):
    """The model cannot be loaded, for a reason that is the user's to mend."""

    reason: str


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A request that can never be run."""

    id: str
    reason: str
    is_fault: bool = False
    """The engine's own fault, and not the request's."""


class Progress(msgspec.Struct, tag=True, frozen=True):
    """What one step brought."""

    events: list[TokenEvent]
    stats: EngineStats


class Checked(msgspec.Struct, tag=True, frozen=True):
    """What the check found; empty if all is well."""

    fault: str


ToEngine = Ask | Cancel | Check | Stop
FromEngine = Here | Ready | Broken | Refused | Progress | Checked

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
