"""A model whose text is scored: small enough to be made anew, in the published format."""

from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.published import save_published
from dsv3.config import ModelConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.loaded import LoadedModel, load
from dsv3.model.transformer import Transformer

TEXTS = ["In the beginning there was a word, and the word was with us. 你好，世界！\n"] * 3


@pytest.fixture(scope="session")
def scored_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scored")
    tokenizer = Tokenizer.train(TEXTS, vocab_size=300)
    tokenizer.save(root / "tokenizer")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 20,  # padded, as the published embedding is
        hidden_size=32,
        num_hidden_layers=2,
        initializer_range=0.2,
        max_position_embeddings=96,
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
    model = Transformer(config)
    model.init_weights(generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.vocab_size :] = 0.0  # As training has it: no token, and never the likeliest.
    save_published(model, folder=root / "weights", tokenizer_folder=root / "tokenizer", dtype=torch.float32)
    return root / "weights"


@pytest.fixture(scope="session")
def scored_model(scored_folder: Path) -> LoadedModel:
    return load(scored_folder, device="cpu")
