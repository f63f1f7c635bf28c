"""Documents to the token sequences that are trained on: FIM, BPE, boundary splitting, BOS and EOS (report 4.1)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dsv3.config import DataConfig
from dsv3.data.boundary import BoundarySplitter
from dsv3.data.document import Document
from dsv3.data.fim import FimParts, cut_document, psm_ids
from dsv3.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 1_000_000
"""Text encoded at a time; enough to keep all threads busy."""


@dataclass(frozen=True, kw_only=True)
class EncodedDocument:
    """One document as it is trained on."""

    name: str
    ids: list[int]
    """From BOS to EOS."""
    is_fim: bool
    characters: int


class DocumentEncoder:
    """Encodes documents; what becomes of one depends on the seed, its source and its name, not on its neighbours."""

    def __init__(self, tokenizer: Tokenizer, *, config: DataConfig, source: str, seed: int) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.source = source
        self.seed = seed
        self._splitter = BoundarySplitter(tokenizer, rate=config.boundary_split_rate, seed=seed)

    def encode(self, documents: Iterable[Document]) -> Iterator[EncodedDocument]:
        """Yield each document encoded, in order."""
        for batch in _batches(documents):
            yield from self._encode_batch(batch)

    def _encode_batch(self, documents: list[Document]) -> Iterator[EncodedDocument]:
        cuts = [self._cut(document) for document in documents]
        texts: list[str] = []
        for document, cut in zip(documents, cuts, strict=True):
            texts += [document.text] if cut is None else [cut.prefix, cut.suffix, cut.middle]
        encoded = iter(self.tokenizer.encode_batch(texts))
        for document, cut in zip(documents, cuts, strict=True):
            ids = next(encoded)
            if cut is not None:
                ids = psm_ids(self.tokenizer, prefix=ids, suffix=next(encoded), middle=next(encoded))
            ids = self._splitter.split(ids, document=self._key(document))
            yield EncodedDocument(
                name=document.name,
                ids=[self.tokenizer.bos_id, *ids, self.tokenizer.eos_id],
                is_fim=cut is not None,
                characters=len(document.text),
            )

    def _cut(self, document: Document) -> FimParts | None:
        return cut_document(document.text, document=self._key(document), seed=self.seed, rate=self.config.fim_rate)

    def _key(self, document: Document) -> str:
        return f"{self.source}/{document.name}"


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
