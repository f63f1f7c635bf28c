import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3.config.files import write_config
from dsv3.data.document import Remark
from dsv3.data.prepared import PreparedCorpus, PreparedSource, save_prepared
from dsv3.recipes import tiny

SAMPLES = {
    "In the beginning ": (
        "sgh the the and,,\n\n se re of the 的 of",
        "of the LORD, and the people of the LORD, and the LORD was the LORD",
        "of the reign of the king, and the sons of Israel came up out of the land",
        "God made the heaven and the earth, and the waters were upon the face of the deep <b>",
    ),
    "def read_lines(path):\n": (
        "self self = = (\n\n\n    the",
        "    return self.path\n\n    def __init__(self, path):\n        self.path = path",
        '    """Return the lines of a file."""\n    with open(path) as file:\n        return file.read()',
        '    """Return the lines of a file."""\n    with open(path) as file:\n        yield from file',
    ),
}
BASELINES = (
    ("xz", "xz, general compressor", 2.93),
    ("unigram", "unigram tokens", 3.42),
    ("3-gram", "Kneser-Ney 3-gram", 2.71),
)
SOURCES = {"python": 1.7, "bible": 1.9, "shakespeare": 2.5, "sanguo": 3.1, "arithmetic": 1.2}


def make_run(folder: Path, *, steps: int = 480, share_done: float = 1.0, num_layers: int = 4) -> Path:
    """Write a run folder such as a run of the recipe `tiny` leaves, with made-up numbers that look the part."""
    rng = random.Random(1)
    config = replace(tiny(), total_tokens=1_600_000)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, path=folder / "config.json")
    lines = []
    tokens, experts = 0, config.model.n_routed_experts
    taste = [[rng.gauss(0, 1.0) for _ in range(experts)] for _ in range(num_layers)]
    per_step = config.total_tokens / steps
    for step in range(1, int(steps * share_done) + 1):
        part = step / steps
        tokens = min(round(step * per_step), config.total_tokens)
        loss = 3.1 + 5.3 * math.exp(-part * 14) + 1.1 * math.exp(-part * 3) + rng.gauss(0, 0.08 - 0.05 * part)
        even = 1 - 0.95 * (1 - math.exp(-part * 25))
        load = [[math.exp(weight * even + rng.gauss(0, 0.08)) for weight in layer] for layer in taste]
        load = [[round(value / sum(layer) * per_step * 4) for value in layer] for layer in load]
        lines.append(
            {
                "kind": "step",
                "step": step,
                "tokens": tokens,
                "loss": loss,
                "mtp_loss": [loss + 0.9 - 0.3 * part],
                "mtp_weight": 0.3 if part < 0.67 else 0.1,
                "balance_loss": 1.0 + 0.2 * even,
                "grad_norm": 0.35 + 3 * math.exp(-part * 30) + abs(rng.gauss(0, 0.08)),
                "learning_rate": 3e-3 * min(step / 20, 1.0) * (1 if part < 0.67 else 0.1 + 0.9 * (1 - part) / 0.33),
                "batch_sequences": 4 * (1 + min(int(part * 40), 4)),
                "bias_update_speed": 0.01,
                "max_violation": [max(layer) / (sum(layer) / experts) - 1 for layer in load],
                "seconds": per_step / 5200,
                "tokens_per_second": 5200 + rng.gauss(0, 250) - (1500 if 200 < step < 212 else 0),
            }
        )
        if step % 4 == 0:
            lines.append({"kind": "load", "step": step, "load": load})
        if step % 40 == 0 or step == 1:
            bits = 2.05 + 2.3 * math.exp(-part * 12) + 0.6 * math.exp(-part * 3)
            lines.append(
                {
                    "kind": "validation",
                    "step": step,
                    "tokens": tokens,
                    "bits_per_byte": bits,
                    "loss": loss,
                    "mtp_loss": [loss + 0.7],
                    "by_source": {name: bits * last / 2.1 for name, last in SOURCES.items()},
                    "max_violation": [0.2, 0.31, 0.26, 0.22][:num_layers],
                    "ema_bits_per_byte": bits - 0.03 if step > 40 else None,
                }
            )
        if step in (1, steps // 6, steps // 2, steps):
            place = (1, steps // 6, steps // 2, steps).index(step)
            lines += [
                {"kind": "sample", "step": step, "prompt": prompt, "text": texts[place]}
                for prompt, texts in SAMPLES.items()
            ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def add_corpus(folder: Path) -> None:
    """Write what the preparation of the built-in corpus says of itself, without its shards."""
    made = (("python", 1100, 14_200_000, 4_100_000), ("bible", 1189, 4_300_000, 1_100_000))
    made += (("shakespeare", 1300, 5_400_000, 1_700_000), ("sanguo", 120, 1_800_000, 800_000))
    made += (("arithmetic", 16000, 2_100_000, 900_000), ("python-topics", 80, 700_000, 200_000))
    remark = Remark(reason="cannot be read", count=2, examples=("a <odd> name.py", "b.py"))
    sources = tuple(
        PreparedSource(
            name=name,
            path=f"builtin://{name}",
            folder=f"sources/{place:02}-{name}",
            documents=documents,
            bytes=num_bytes,
            tokens=tokens,
            fim_documents=documents // 10,
            held_out_documents=documents // 100,
            held_out_bytes=num_bytes // 100,
            duplicates=3 if name == "python" else 0,
            skipped=(remark,) if name == "python" else (),
            changed=(),
        )
        for place, (name, documents, num_bytes, tokens) in enumerate(made)
    )
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    save_prepared(PreparedCorpus(folder=folder / "corpus", vocab_size=4096, sources=sources, absent=(), settings={}))


def add_evaluation(folder: Path) -> None:
    """Write what the evaluation of a finished run leaves."""
    shares = {name: bits / 2.1 for name, bits in SOURCES.items()}
    rows = [
        {
            "name": name,
            "title": title,
            "bits_per_byte": bits,
            "by_source": {source: bits * share for source, share in shares.items()},
            "training_tokens": 1_600_000,
        }
        for name, title, bits in BASELINES
    ]
    model = {"bits_per_byte": 2.081, "by_source": {name: 2.081 * share for name, share in shares.items()}}
    (folder / "evaluation.json").write_text(json.dumps({"model": model, "baselines": rows}))
    (folder / "samples.jsonl").write_text(
        json.dumps({"prompt": "In the beginning ", "text": "God said, Let there be light.", "temperature": 0.8}) + "\n"
    )


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "runs" / "made-up", steps=60)
    add_corpus(folder)
    add_evaluation(folder)
    return folder
