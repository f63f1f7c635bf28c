"""Small models that are ours and transformers' at once, joined by the files of a published folder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig
from dsv3.model.transformer import Transformer

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "intermediate_size": 64,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.15,
}


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    """Make a small model; keywords change its config. Router biases are random and mostly negative."""

    def make(**change) -> Transformer:
        generator = torch.Generator().manual_seed(11)
        model = Transformer(ModelConfig(**SIZES | change))
        model.init_weights(generator=generator)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.normal_(1.0, 0.2, generator=generator)
        for router in model.routers():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.normal_(-0.5, 0.6, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def load_with_transformers() -> Callable[[Path], torch.nn.Module]:
    """Load a published folder as `transformers.AutoModelForCausalLM`, in FP32."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    def load(folder: Path) -> torch.nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    return load


@pytest.fixture(scope="session")
def sequences() -> list[list[int]]:
    """Token ids; the longest is three times the original context of the YaRN settings used here."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 96, (length,), generator=generator).tolist() for length in (1, 17, 96)]


@pytest.fixture(scope="session")
def largest_difference() -> Callable[..., float]:
    """Run both models on all sequences; the largest difference of a token's logits, relative to their norm."""

    @torch.no_grad()
    def compare(ours: Transformer, theirs: torch.nn.Module, *, sequences: list[list[int]]) -> float:
        logits = ours.logits(ours(TokenBatch.from_sequences(sequences)).hidden)
        expected = torch.cat([theirs(torch.tensor([ids])).logits[0] for ids in sequences])
        return relative_difference(logits, expected)

    return compare


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
