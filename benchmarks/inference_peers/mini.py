"""The model that every system serves: V3's shape at 1.2 B random weights, and its files."""

from pathlib import Path

import torch

from dsv3.checkpoint.gguf import convert_gguf
from dsv3.checkpoint.published import save_published
from dsv3.checkpoint.published_folder import is_published_folder
from dsv3.config import ModelConfig
from dsv3.model.transformer import Transformer

MINI = ModelConfig(
    vocab_size=32_000,
    hidden_size=1024,
    num_hidden_layers=12,
    initializer_range=0.02,
    max_position_embeddings=4096,
    num_attention_heads=16,
    q_lora_rank=384,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=2816,
    moe_intermediate_size=512,
    first_k_dense_replace=1,
    n_routed_experts=64,
    n_shared_experts=1,
    num_experts_per_tok=6,
    n_group=8,
    topk_group=4,
    num_nextn_predict_layers=0,
)
QUANTISED_BY_LLAMA = {"q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M", "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}


def published_folder(work: Path) -> Path:
    """Return the model's published folder, in BF16; make it if it is not there.

    The weights are rounded to BF16 once, so that every system in FP32 or BF16 has the very same ones.
    """
    folder = work / "published"
    if not is_published_folder(folder):
        model = Transformer(MINI)
        model.init_weights(generator=torch.Generator().manual_seed(0))
        save_published(model, folder=folder, tokenizer_folder=None, dtype=torch.bfloat16, overwrite=True)
    return folder


def gguf_file(work: Path, *, kind: str) -> Path:
    """Return the model's GGUF file in a type; make it if it is not there: by our export, 4 bits by llama.cpp's own."""
    file = work / f"{kind}.gguf"
    if file.exists():
        return file
    if kind not in QUANTISED_BY_LLAMA:
        convert_gguf(published_folder(work), file=file, kind=kind)
        return file
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, QUANTISED_BY_LLAMA[kind])
    partial = work / f"{kind}.partial"
    source = gguf_file(work, kind="bf16")
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), settings)
    if failed:
        raise RuntimeError(f"llama.cpp could not quantise {source} to {kind}")
    partial.rename(file)
    return file
