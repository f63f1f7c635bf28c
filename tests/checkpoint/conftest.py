import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsv3.checkpoint.published import save_published
from dsv3.config import ModelConfig
from dsv3.model.transformer import Transformer

TINY = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "q_lora_rank": 10,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "intermediate_size": 30,
    "moe_intermediate_size": 9,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "initializer_range": 0.3,
}


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    """Make a small model with random weights and biases; keywords change its config."""

    def make(**change) -> Transformer:
        generator = torch.Generator().manual_seed(7)
        model = Transformer(ModelConfig(**TINY | change))
        model.init_weights(generator=generator)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norm gains all start at 1, and could be exchanged unnoticed
                parameter.data.normal_(1.0, 0.2, generator=generator)
        for router in model.routers():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.normal_(generator=generator)
        return model

    return make


@pytest.fixture
def folder(tmp_path: Path, make_model) -> Path:
    """A published folder of several shards."""
    save_published(
        make_model(), folder=tmp_path / "model", tokenizer_folder=None, dtype=torch.float32, max_shard_bytes=8_000
    )
    return tmp_path / "model"


@pytest.fixture
def rewrite() -> Callable[..., None]:
    """Put all weights of a folder into one file without an index, after a change of the dict of tensors."""

    def rewrite_as_one_file(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            path.unlink()
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite_as_one_file


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Change fields of a folder's config.json; None takes a field away."""

    def edit(folder: Path, **fields) -> None:
        values = json.loads((folder / "config.json").read_text()) | fields
        values = {name: value for name, value in values.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(values))

    return edit
