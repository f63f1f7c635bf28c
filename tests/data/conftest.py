import gzip
import json
from pathlib import Path

import pytest

from dsv3.config import BatchConfig, DataConfig, ModelConfig, PretrainConfig, RuntimeConfig, SourceConfig
from dsv3.data.prepare import PreparedCorpus, prepare_corpus
from dsv3.data.tokenizer import Tokenizer

# Written for these tests: prose, Chinese, code and numbers, with the combinations the pre-tokeniser is about.
TEXTS = [
    f"Section {number}.\n\nThe river (which is {number * 7} miles long) runs to the sea; nobody knows why!\n"
    f"def step_{number}(x):\n    return [x, {number}]\n\n河流很长，一共{number}里。\n"
    for number in range(60)
]


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    """600 entries at most, trained in a moment."""
    return Tokenizer.train(TEXTS, vocab_size=600)


@pytest.fixture(scope="session")
def published_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3's tokenizer.json and tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("published")
    source = shared_data / "deepseek-v3-tokenizer"
    (folder / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    (folder / "tokenizer_config.json").write_bytes((source / "tokenizer_config.v3.json").read_bytes())
    return folder


@pytest.fixture(scope="session")
def published(published_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(published_folder)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """60 short documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def write_sources(folder: Path) -> tuple[SourceConfig, SourceConfig]:
    """Two JSON lines files without a document in common, one source weighted three times the other."""
    sources = []
    for name, weight in (("rivers", 3.0), ("hills", 1.0)):
        file = folder / f"{name}.jsonl"
        lines = [json.dumps({"text": f"{name} {number}: {text}"}) for number, text in enumerate(TEXTS)]
        file.write_text("\n".join(lines), encoding="utf-8")
        sources.append(SourceConfig(path=str(file), name=name, weight=weight))
    return sources[0], sources[1]


@pytest.fixture
def two_sources(tmp_path: Path) -> tuple[SourceConfig, SourceConfig]:
    return write_sources(tmp_path)


def tiny_run(
    *sources: SourceConfig,
    vocab_size: int = 600,
    sequence_length: int = 32,
    seed: int = 0,
    total_tokens: int = 100_000,
    **data: object,
) -> PretrainConfig:
    """A run whose model is never built: only its data settings matter here."""
    return PretrainConfig(
        model=ModelConfig(vocab_size=vocab_size),
        data=DataConfig(sources=sources, **{"held_out_rate": 0.1, **data}),
        batch=BatchConfig(sequence_length=sequence_length),
        runtime=RuntimeConfig(seed=seed),
        total_tokens=total_tokens,
    )


@pytest.fixture(name="tiny_run")
def tiny_run_fixture():
    return tiny_run


@pytest.fixture(scope="session")
def prepared_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedCorpus, PretrainConfig]:
    """A corpus of two sources in several shards each, and the run it belongs to. Not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_run(*write_sources(folder), shard_tokens=1500)
    return prepare_corpus(config, folder=folder / "corpus"), config
