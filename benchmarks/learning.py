"""Claim: the quickstart's model predicts held-out text far better than simple predictors of the same tokens.

Trains recipe `tiny` as the quickstart does and scores it, in bits per byte of held-out documents, beside a unigram and
a Kneser-Ney n-gram over the same BPE trained on the very tokens the model has read, and beside xz.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from claims.record import Claim, arguments, report

from dsv3.data.prepared import load_prepared
from dsv3.evals.evaluation import evaluate, held_out_text, training_rows
from dsv3.infer.loaded import load
from dsv3.recipes import tiny
from dsv3.train.loop import pretrain

SCORED_TOKENS = 100_000


def main() -> None:
    options = arguments(__doc__)
    config = tiny()
    if options.quick:
        config = replace(config, total_tokens=config.total_tokens // 10)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        result = pretrain(config, folder=folder)
        corpus = load_prepared(folder / "corpus")
        evaluation = evaluate(
            load(folder).model,
            text=held_out_text(corpus, max_tokens=SCORED_TOKENS),
            tokenizer=corpus.tokenizer(),
            window=config.batch.sequence_length,
            rows=training_rows(corpus, config=config, tokens=result.tokens),
        )
    ours = evaluation.model.bits_per_byte
    claims = [
        Claim(
            name="bits per byte of held-out text",
            ours=ours,
            peer=baseline.bits_per_byte,
            peer_name=baseline.name,
            ratio=baseline.bits_per_byte / ours,
            target=1.0,
        )
        for baseline in evaluation.baselines
    ]
    report(claims, title=f"Learning: recipe tiny, {result.tokens:,} tokens", json_file=options.json)


if __name__ == "__main__":
    main()
