"""Documents to the token sequences that are trained on: FIM, BPE, boundary splitting, BOS and EOS (report 4.1)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dsv3.config import DataConfig
from dsv3.data.boundary import BoundarySplitter
from dsv3.data.document import Document
from dsv3.data.fim import cut_document, psm_ids
from dsv3.data.tokenizer import AT_ONCE_CHARACTERS, Tokenizer


@dataclass(frozen=True, kw_only=True)
class EncodedDocument:
    """One document as it is trained on."""

    name: str
    ids: list[int]
    """From BOS to EOS."""


class DocumentEncoder:
    """Encodes documents; what becomes of one depends on the seed, its source and its name, not on its neighbours."""

    def __init__(self, tokenizer: Tokenizer, *, config: DataConfig, seed: int) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.seed = seed
        self._splitter = BoundarySplitter(tokenizer, rate=config.boundary_split_rate, seed=seed)

    def encode(self, documents: Iterable[Document], *, source: str) -> Iterator[EncodedDocument]:
        """Yield each document of a source encoded, in order."""
        for batch in _batches(documents):
            yield from self._encode_batch(batch, source=source)

    def _encode_batch(self, documents: list[Document], *, source: str) -> Iterator[EncodedDocument]:
        keys = [f"{source}/{document.name}" for document in documents]
        cuts = [
            cut_document(document.text, document=key, seed=self.seed, rate=self.config.fim_rate)
            for document, key in zip(documents, keys, strict=True)
        ]
        texts: list[str] = []
        for document, cut in zip(documents, cuts, strict=True):
            texts += [document.text] if cut is None else [cut.prefix, cut.suffix, cut.middle]
        encoded = iter(self.tokenizer.encode_batch(texts))
        for document, key, cut in zip(documents, keys, cuts, strict=True):
            ids = next(encoded)
            if cut is not None:
                ids = psm_ids(self.tokenizer, prefix=ids, suffix=next(encoded), middle=next(encoded))
            ids = self._splitter.split(ids, document=key)
            yield EncodedDocument(name=document.name, ids=[self.tokenizer.bos_id, *ids, self.tokenizer.eos_id])


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= AT_ONCE_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
