"""Fill-in-the-middle: a tenth of the documents is rearranged as prefix, suffix, middle (PSM; report 4.1)."""

import random
from dataclasses import dataclass

from dsv3.data.chance import falls_below, hash_parts
from dsv3.data.special_tokens import EOS, FIM_BEGIN, FIM_END, FIM_HOLE
from dsv3.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class FimParts:
    """A document cut in three; joined in this order they are the document."""

    prefix: str
    middle: str
    suffix: str


def cut_document(text: str, *, document: str, seed: int, rate: float) -> FimParts | None:
    """Cut a document in three, or return None for the share `1 - rate` that stays as it is.

    Both cuts are uniform over its characters (the report does not say; this is customary). They depend on the seed
    and the name of the document alone.

    Source: report 4.1, 'document-level', before packing, at a rate of 0.1.
    """
    if not falls_below(hash_parts("fim", seed, document), rate=rate):
        return None
    generator = random.Random(hash_parts("fim cuts", seed, document))
    first, second = sorted((generator.randint(0, len(text)), generator.randint(0, len(text))))
    return FimParts(prefix=text[:first], middle=text[first:second], suffix=text[second:])


def psm_text(parts: FimParts) -> str:
    """Return the sequence as the report spells it, ending in EOS; BOS is not part of it."""
    return f"{FIM_BEGIN}{parts.prefix}{FIM_HOLE}{parts.suffix}{FIM_END}{parts.middle}{EOS}"


def psm_ids(tokenizer: Tokenizer, *, prefix: list[int], suffix: list[int], middle: list[int]) -> list[int]:
    """Return the ids of the sequence, without BOS and EOS; each part has been encoded by itself."""
    return [tokenizer.fim_begin_id, *prefix, tokenizer.fim_hole_id, *suffix, tokenizer.fim_end_id, *middle]
