"""Settings of the inference engine."""

from dataclasses import dataclass

from dsv3.config.check import require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much the engine works on at once, and how it drafts. None of it changes what a request is answered."""

    page_tokens: int = 64
    """Tokens of one page of the latent cache: what is allotted, shared between requests and given back."""
    num_pages: int = 256
    """Pages there are; at least one request of full context must fit, or longer ones are refused."""
    max_step_tokens: int = 512
    """Tokens that one forward pass reads at most; longer prompts are read in chunks beside the others' decoding."""
    max_sequences: int = 64
    """Requests worked on in one step; the rest wait."""
    prefix_caching: bool = True
    """Keep full pages of finished requests while there is room, for requests that begin with the same tokens."""
    max_drafts: int = 0
    """Tokens that the MTP modules draft ahead for each request and step, to be verified in one pass; 0 drafts none."""
    adaptive_drafts: bool = True
    """Draft fewer, or none, while drafting does not pay; otherwise always `max_drafts`."""

    def __post_init__(self) -> None:
        require_positive(self, "page_tokens", "num_pages", "max_step_tokens", "max_sequences")
        require_not_negative(self, "max_drafts")
