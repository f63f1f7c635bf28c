"""What the processes of a server tell each other, and what the machines do whose workers it uses."""

import msgspec

from dsv3.config import ServerConfig
from dsv3.infer.events import EngineStats, TokenEvent
from dsv3.infer.params import SamplingParams
from dsv3.serve.grammar import GrammarSpec


class RankPlace(msgspec.Struct, frozen=True):
    """An engine's place among those that share the experts with it."""

    meeting: str
    """Where they find each other: a folder, or tcp://HOST:PORT of a store; another one each time that they begin."""
    rank: int
    size: int
    decodes: bool
    """Whether passes are short, so that how long an exchange takes matters more than how much it carries."""


class ProcessSettings(msgspec.Struct, frozen=True):
    """What an engine's process is told when it begins."""

    config: ServerConfig
    secret: str = ""
    """Known to the processes that hand each other pages; empty where none do."""
    host: str = "127.0.0.1"
    """This machine's address as those processes reach it; pages are taken there."""
    place: RankPlace | None = None
    """None where all experts are in this process."""


class HandTo(msgspec.Struct, frozen=True):
    """Who goes on with a request once its prompt is read."""

    address: str
    """Where its pages are taken."""
    first_page: int
    """The first one that is lacking there."""


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
    answer_ids: list[int] = []
    """Tokens of the answer that have been told already."""
    hand_to: HandTo | None = None
    """Read it, and hand it over; None answers it here."""


class Expect(msgspec.Struct, tag=True, frozen=True):
    """A request that another engine will read and hand over. Answered with `Room` as soon as there is some."""

    ask: Ask


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Nobody waits for these any more."""

    ids: list[str]


class Check(msgspec.Struct, tag=True, frozen=True):
    """The engine is to check its own books."""


class Leave(msgspec.Struct, tag=True, frozen=True):
    """Whoever took pages at an address has gone."""

    address: str


class Wake(msgspec.Struct, tag=True, frozen=True):
    """Some rank that shares experts with this one has work, or will have; all of them are told the same number."""

    number: int


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
    address: str = ""
    """Where pages of other engines are taken."""


class Alive(msgspec.Struct, tag=True, frozen=True):
    """There is nothing to tell, which is to be told now and then."""


class Room(msgspec.Struct, tag=True, frozen=True):
    """An expected request has its pages."""

    id: str
    first_page: int
    """The first one that is lacking here."""


class Adopted(msgspec.Struct, tag=True, frozen=True):
    """All of an expected request has come, and it goes on here."""

    id: str
    num_bytes: int


class Lost(msgspec.Struct, tag=True, frozen=True):
    """What has come of an expected request is of no use; it must be read again."""

    id: str
    reason: str


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


class Join(msgspec.Struct, tag=True, frozen=True):
    """A machine offers workers to a server. Its first word; later versions keep its form."""

    version: str
    """Of dsv3: what both tell each other is the same within one."""
    name: str
    host: str
    """Where its workers take pages."""
    model: dict[str, str]
    """What `digest_of` the model's folder says there."""
    prefill: int
    decode: int


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """The workers are taken."""

    silent_seconds: float
    """After so long without a word either end takes the other for gone."""


class Farewell(msgspec.Struct, tag=True, frozen=True):
    """The machine is not needed, or not any more."""

    reason: str
    is_refusal: bool = False
    """Whether it has to do with the machine: it is then to end with an error."""


class Begin(msgspec.Struct, tag=True, frozen=True):
    """The machine is to start a worker."""

    number: int
    """The worker's, for as long as it lives."""
    name: str
    settings: ProcessSettings
    """The model's folder, device, threads and host are the machine's own affair."""


class End(msgspec.Struct, tag=True, frozen=True):
    """The machine is to end a worker."""

    number: int
    at_once: bool


class Ended(msgspec.Struct, tag=True, frozen=True):
    """A worker has ended, and there is room for another one."""

    number: int


class Beat(msgspec.Struct, tag=True, frozen=True):
    """Whoever says it is still there."""


ToEngine = Ask | Expect | Cancel | Leave | Check | Wake | Stop
FromEngine = Here | Ready | Broken | Refused | Progress | Checked | Alive | Room | Adopted | Lost


class ToWorker(msgspec.Struct, tag=True, frozen=True):
    """Something for one of the machine's workers."""

    number: int
    message: ToEngine


class FromWorker(msgspec.Struct, tag=True, frozen=True):
    """Something that one of the machine's workers has said."""

    number: int
    message: FromEngine


ToMachine = Welcome | Farewell | Begin | End | ToWorker | Beat
FromMachine = Join | FromWorker | Ended | Beat

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
decode_to_machine = msgspec.msgpack.Decoder(ToMachine).decode
decode_from_machine = msgspec.msgpack.Decoder(FromMachine).decode
