"""A tokenizer and a model small enough to make anew, and the folders they may come in."""

import logging
from dataclasses import replace

import pytest
import torch

from dsv3.checkpoint.published import save_published
from dsv3.checkpoint.snapshot import save_snapshot
from dsv3.config import BatchConfig, ModelConfig, PretrainConfig, SnapshotConfig
from dsv3.config.files import write_config
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.transformer import Transformer

TEXTS = ["In the beginning there was a word, and the word was with us. 你好，世界！\n"] * 3


TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    initializer_range=0.25,
    max_position_embeddings=128,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    intermediate_size=40,
    moe_intermediate_size=12,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
)
"""A V3 as small as one can be with every part in it, for many passes."""


class Scripted(Transformer):
    """Says a fixed list of tokens, and writes down how many tokens were run and how many logits were asked for."""

    script: tuple[int, ...] = ()

    def forward(self, batch, **options):
        self.tokens_run.append(batch.num_tokens)
        return super().forward(batch, **options)

    def logits(self, hidden):
        self.logits_made.append(hidden.shape[0])
        logits = torch.zeros(hidden.shape[0], self.config.vocab_size)
        logits[-1, self.script[len(self.logits_made) - 1]] = 1.0
        return logits


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=300)


@pytest.fixture(scope="session")
def model_config(tokenizer):
    return ModelConfig(
        vocab_size=tokenizer.vocab_size + 20,  # padded, as the published embedding is
        hidden_size=24,
        num_hidden_layers=2,
        initializer_range=0.2,
        max_position_embeddings=64,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        intermediate_size=32,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
    )


@pytest.fixture(scope="session")
def model(model_config):
    model = Transformer(model_config)
    model.init_weights(generator=torch.Generator().manual_seed(3))
    for router in model.routers():
        router.e_score_correction_bias.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(4))
    return model.requires_grad_(False)


@pytest.fixture
def published(tmp_path, model, tokenizer):
    """A published-format folder with tokenizer, in float32."""
    tokenizer.save(tmp_path / "tokenizer")
    save_published(model, folder=tmp_path / "weights", tokenizer_folder=tmp_path / "tokenizer", dtype=torch.float32)
    return tmp_path / "weights"


@pytest.fixture
def new_run(tmp_path, model_config, tokenizer):
    """A run folder that has a tokenizer and no weights yet."""
    config = PretrainConfig(
        model=model_config,
        batch=BatchConfig(sequence_length=32).steady(1),
    )
    folder = tmp_path / "run"
    write_config(config, path=folder / "config.json")
    tokenizer.save(folder / "corpus" / "tokenizer")
    return folder


@pytest.fixture
def average(model):
    """What a run keeps as the moving average: parameters, without router biases."""
    return {name: 0.5 * parameter for name, parameter in model.named_parameters()}


@pytest.fixture
def run_with_snapshots(new_run, model, model_config, average):
    """The same run with two snapshots, of which the newer one is `model`, with its average."""
    older = Transformer(model_config)
    older.init_weights(generator=torch.Generator().manual_seed(9))
    for step, weights in ((10, older), (20, model)):
        tensors = {"model": weights.state_dict(), "first_moment": {"anything": torch.zeros(2)}}
        tensors |= {"average": average} if weights is model else {}
        save_snapshot(new_run / "snapshots", step=step, tensors=tensors, state={}, policy=SnapshotConfig(keep_last=5))
    return new_run


@pytest.fixture
def with_limit(model, model_config):
    """The model again with another context length, sharing its weights."""

    def build(limit):
        other = Transformer(replace(model_config, max_position_embeddings=limit))
        other.load_state_dict(model.state_dict(), assign=True)
        return other.requires_grad_(False)

    return build


@pytest.fixture
def scripted(model, model_config):
    def build(*script):
        speaker = Scripted(model_config)
        speaker.load_state_dict(model.state_dict(), assign=True)
        speaker.script, speaker.tokens_run, speaker.logits_made = script, [], []
        return speaker.requires_grad_(False)

    return build


@pytest.fixture
def log(caplog):
    """Log records of the package, also when the command line has turned propagation off."""
    logger = logging.getLogger("dsv3")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="dsv3")
    yield caplog
    logger.removeHandler(caplog.handler)
