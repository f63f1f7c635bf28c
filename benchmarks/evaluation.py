"""Claim: our scores are those of lm-eval's own model `hf` over transformers, and come sooner.

Questions of MMLU (five worked examples, letters scored), HellaSwag and ARC-Challenge (endings scored) are put, as
lm-eval's requests, to one exported model by both, in FP32 on one thread. Its weights are random, which neither equality
nor speed depends on; its tokenizer is the published one, so the head has 129,280 rows. Theirs takes the faster of two
batch sizes, which the first questions choose.
"""

import gzip
import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from claims.record import Claim, arguments, report

from dsv3.checkpoint.published import save_published
from dsv3.config import ModelConfig
from dsv3.errors import MissingExtraError
from dsv3.model.transformer import Transformer

DATA = Path(__file__).parents[1].parent / "shared" / "data"
MODEL = ModelConfig(
    vocab_size=129_280,
    hidden_size=256,
    num_hidden_layers=6,
    initializer_range=0.05,
    max_position_embeddings=4096,
    num_attention_heads=8,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    intermediate_size=768,
    moe_intermediate_size=128,
    first_k_dense_replace=1,
    n_routed_experts=32,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=0,
)
QUESTIONS, QUICK_QUESTIONS = 45, 12
"""Of each benchmark; a question has four requests."""
BATCH_SIZES = (1, 8)
ROUNDS = 3
"""In which both score all requests, ours first; medians count. One, if quick."""
TRIED = 4
"""Questions by which their batch size is chosen."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question of four options."""

    context: str
    options: tuple[str, ...]
    right: int


def lines(path: str) -> Iterator[dict[str, Any]]:
    with gzip.open(DATA / path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def lettered(item: dict[str, Any], *, answer: str) -> str:
    options = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", item["choices"], strict=True))
    return f"{item['question'].strip()}{options}\nAnswer:{answer}"


def mmlu() -> Iterator[Asked]:
    shots: dict[str, str] = {}
    for item in lines("mmlu/dev.jsonl.gz"):
        shot = lettered(item, answer=f" {'ABCD'[item['answer']]}\n\n")
        shots[item["subject"]] = shots.get(item["subject"], "") + shot
    for item in lines("mmlu/test.jsonl.gz"):
        context = shots[item["subject"]] + lettered(item, answer="")
        yield Asked(context=context, options=(" A", " B", " C", " D"), right=item["answer"])


def hellaswag() -> Iterator[Asked]:
    for item in lines("hellaswag/val.jsonl.gz"):
        yield Asked(context=item["ctx"], options=tuple(f" {ending}" for ending in item["endings"]), right=item["label"])


def arc() -> Iterator[Asked]:
    for item in lines("commonsense-mc/arc-challenge-test.jsonl.gz"):
        if len(item["choices"]) == 4:
            context = f"Question: {item['question']}\nAnswer:"
            yield Asked(context=context, options=tuple(f" {text}" for text in item["choices"]), right=item["answer"])


READERS: dict[str, Callable[[], Iterator[Asked]]] = {"mmlu": mmlu, "hellaswag": hellaswag, "arc": arc}


def requests(questions: list[Asked]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type="loglikelihood", doc={}, arguments=(question.context, option), idx=place)
        for question in questions
        for place, option in enumerate(question.options)
    ]


def save_model(folder: Path) -> None:
    tokenizer = folder.with_name("tokenizer")
    tokenizer.mkdir()
    source = DATA / "deepseek-v3-tokenizer"
    (tokenizer / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    settings = json.loads((source / "tokenizer_config.v3.json").read_text())
    # The published class adds the begin token in some versions of transformers only: see dsv3/data/tokenizer.py.
    definition = json.loads((tokenizer / "tokenizer.json").read_text())
    begin = "<｜begin▁of▁sentence｜>"
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {begin: {"id": begin, "ids": [0], "tokens": [begin]}},
    }
    (tokenizer / "tokenizer.json").write_text(json.dumps(definition))
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    model = Transformer(MODEL)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    save_published(model, folder=folder, tokenizer_folder=tokenizer, dtype=torch.float32)


def timed(score: Callable[[list[Any]], list[tuple[float, bool]]], asked: list[Any]) -> tuple[list[Any], float]:
    began = time.process_time()
    scores = score(asked)
    return scores, time.process_time() - began


def accuracy(scores: list[tuple[float, bool]], *, questions: list[Asked]) -> float:
    right = 0
    for place, question in enumerate(questions):
        mine = [logprob for logprob, _ in scores[4 * place : 4 * place + 4]]
        right += max(range(4), key=mine.__getitem__) == question.right
    return right / len(questions)


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        from dsv3.evals.lm_eval_adapter import Dsv3LM
    except MissingExtraError as error:
        print(f"absent: {error}")
        return
    from lm_eval.models.huggingface import HFLM

    rng = random.Random(0)
    claims: list[Claim] = []
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "weights"
        save_model(folder)
        ours = Dsv3LM(str(folder), device="cpu")
        peers = {
            size: HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=size) for size in BATCH_SIZES
        }
        for peer in peers.values():
            peer.model.set_experts_implementation("eager")  # The fastest for prompts: see transformers_system.py.
        for name, reader in READERS.items():
            count = QUICK_QUESTIONS if options.quick else QUESTIONS
            pool = list(islice(reader(), 4000))
            questions = rng.sample(pool, count) if name != "mmlu" else together(pool, count=count, rng=rng)
            asked = requests(questions)
            seconds_of = {size: timed(peer.loglikelihood, asked[: 4 * TRIED])[1] for size, peer in peers.items()}
            best = min(seconds_of, key=seconds_of.__getitem__)
            rounds = [
                (timed(ours.loglikelihood, asked), timed(peers[best].loglikelihood, asked))
                for _ in range(1 if options.quick else ROUNDS)
            ]
            mine, others = (scores for scores, _ in rounds[0])
            my_seconds, their_seconds = (median(one[side][1] for one in rounds) for side in (0, 1))
            peer_name = f"lm-eval hf, batch {best}"
            error = max(abs(a - b) for (a, _), (b, _) in zip(mine, others, strict=True))
            same = all(a == b for (_, a), (_, b) in zip(mine, others, strict=True))
            my_accuracy, their_accuracy = (accuracy(scores, questions=questions) for scores in (mine, others))
            details[name] = {
                "requests": len(asked),
                "seconds": my_seconds,
                "peer_seconds": their_seconds,
                "likeliest_tokens": sum(greedy for _, greedy in mine),
            }
            claims += [
                Claim(
                    name=f"{name}: largest difference of {len(asked)} log-likelihoods, beside 1e-3",
                    ours=error,
                    peer=1e-3,
                    peer_name=peer_name,
                    ratio=1e-3 / max(error, 1e-12),
                    target=1.0,
                ),
                Claim(
                    name=f"{name}: accuracy and all is_greedy, 1 if the same",
                    ours=my_accuracy,
                    peer=their_accuracy,
                    peer_name=peer_name,
                    ratio=float(my_accuracy == their_accuracy and same),
                    target=1.0,
                ),
                Claim(
                    name=f"{name}: requests a CPU second",
                    ours=len(asked) / my_seconds,
                    peer=len(asked) / their_seconds,
                    peer_name=peer_name,
                    ratio=their_seconds / my_seconds,
                    target=2.0,
                ),
            ]
    report(claims, title="Evaluation: one model, two ways to score it", json_file=options.json, details=details)


def together(pool: list[Asked], *, count: int, rng: random.Random) -> list[Asked]:
    """Return questions that follow each other, for those of a subject share their worked examples."""
    first = rng.randrange(len(pool) - count)
    return pool[first : first + count]


if __name__ == "__main__":
    main()
