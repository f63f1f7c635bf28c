"""One GGUF file of a model and its tokenizer, for llama.cpp, Ollama and others that read the format.

The file is written through the `gguf` package, one tensor at a time, and takes its name only when it is whole. What
lies in it is told by `gguf_layout.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsv3.checkpoint.gguf_layout import GgufTensor, gguf_layout, require_expressible, uses_groups
from dsv3.checkpoint.names import PublishedTensor
from dsv3.checkpoint.published import published_value
from dsv3.checkpoint.reader import open_published
from dsv3.checkpoint.writer import explain_failure, require_space
from dsv3.config import ModelConfig
from dsv3.data.tokenizer import SPLIT_RULES, Tokenizer
from dsv3.errors import CheckpointError, ConfigError, TokenizerError
from dsv3.model.transformer import Transformer
from dsv3.runtime.atomic import force_to_disk
from dsv3.runtime.log import get_logger

if TYPE_CHECKING:
    import gguf

ARCHITECTURE = "deepseek2"
"""GGUF's name for every model with MLA and DeepSeekMoE, V3 among them."""
GGUF_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""What we call the types, and the format's names. Q8_0: 32 values in int8 share one multiplier in FP16."""
BLOCK_OF_Q8_0 = 32
BYTES_OF = {"F32": 4.0, "F16": 2.0, "BF16": 2.0, "Q8_0": 34 / 32}
LARGEST_F16 = torch.finfo(torch.float16).max
BARS = (("<|", "|>"), ("<｜", "｜>"))
"""What a token is written between that controls, whether or not it is marked special: readers do not print those."""


def save_gguf(
    model: Transformer, *, file: Path, kind: str, tokenizer: Tokenizer | None, overwrite: bool = False
) -> None:
    """Write the model, without its MTP modules, as one GGUF file that shows the file's stem as the model's name.

    Args:
        model: its weights may be in any type.
        file: ends in .gguf. It appears whole or not at all.
        kind: type of the matrices, of `GGUF_TYPES`. Norms, routers and their biases are in FP32. A matrix whose rows do
            not divide into blocks of 32 is in F16 where the file is Q8_0.
        tokenizer: goes into the file with its chat template; without one the file answers to token ids only.
        overwrite: replace a file that is there.

    Raises:
        ConfigError: the package `gguf` is not installed, `kind` is no type, or the model is one that readers of the
            format would compute otherwise.
        TokenizerError: the tokenizer is not byte-level BPE with V3's rules, which is the one way of cutting text that
            we name in the file.
        CheckpointError: `file` is there already and not to be replaced, or cannot be written, or the disk is full; or
            a weight cannot be in `kind`.
    """
    state = model.state_dict()

    def read(tensor: PublishedTensor) -> Tensor:
        value = published_value(tensor, state=state, dtype=torch.float32)
        assert isinstance(value, Tensor)
        return value

    _write_file(file, config=model.config, read=read, kind=kind, tokenizer=tokenizer, overwrite=overwrite)


def convert_gguf(source: Path, *, file: Path, kind: str, overwrite: bool = False) -> None:
    """Write the published folder `source`, FP8 or not, as one GGUF file; see `save_gguf` for what is in it.

    No model is made, and at most one tensor of the file, all experts' matrices of one kind in a layer, is in memory.

    Raises:
        CheckpointError, ConfigError, TokenizerError: as `save_gguf`; or `source` cannot be read.
    """
    reader = open_published(source)
    tokenizer = Tokenizer.from_file(source) if (source / "tokenizer.json").is_file() else None
    _write_file(file, config=reader.config, read=reader.read, kind=kind, tokenizer=tokenizer, overwrite=overwrite)


def _write_file(
    file: Path,
    *,
    config: ModelConfig,
    read: Callable[[PublishedTensor], Tensor],
    kind: str,
    tokenizer: Tokenizer | None,
    overwrite: bool,
) -> None:
    writer = _new_writer()
    if kind not in GGUF_TYPES:
        raise ConfigError(f"weights in GGUF can be {', '.join(GGUF_TYPES)}, not {kind}")
    file = file.resolve()
    if file.suffix != ".gguf" or file.is_dir():
        raise CheckpointError(f"{file} cannot be a GGUF file; give a file name that ends in .gguf")
    if file.exists() and not overwrite:
        raise CheckpointError(f"{file} is there already; give another name, or allow it with overwrite (--overwrite)")
    require_expressible(config)
    _describe_model(writer, config=config, name=file.stem, kind=GGUF_TYPES[kind])
    _describe_vocabulary(writer, config=config, tokenizer=tokenizer)
    if config.num_nextn_predict_layers:
        get_logger(__name__).warning(
            "the MTP modules are left out: readers of GGUF compute V3 without them, one token a step"
        )
    layout = gguf_layout(config)
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(_num_bytes(tensor, kind=_kind_of(tensor, wanted=GGUF_TYPES[kind])) for tensor in layout)
        require_space(file.parent, needed=needed)
        _write(writer, partial, layout=layout, read=read, wanted=GGUF_TYPES[kind])
        force_to_disk(partial)
        partial.replace(file)
        force_to_disk(file.parent)
    except OSError as error:
        raise explain_failure(error, target=file) from error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _new_writer() -> "gguf.GGUFWriter":
    try:
        import gguf
    except ImportError:
        raise ConfigError("writing GGUF needs the package gguf; install it with: pip install 'dsv3[gguf]'") from None
    return gguf.GGUFWriter(path=None, arch=ARCHITECTURE)


def _describe_model(writer: "gguf.GGUFWriter", *, config: ModelConfig, name: str, kind: str) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    # Attention, as one key head of latent and rope key: what absorbed attention sees.
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    # A loader that expects a query latent and finds none does not load; of no width it projects directly.
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if (yarn := config.rope_scaling) is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
        # The format holds a tenth of it, as it stands before ln(s).
        writer.add_rope_scaling_yarn_log_mul(0.1 * yarn.mscale_all_dim)
    _describe_experts(writer, config=config)


def _describe_experts(writer: "gguf.GGUFWriter", *, config: ModelConfig) -> None:
    import gguf

    writer.add_leading_dense_block_count(min(config.first_k_dense_replace, config.num_hidden_layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    if uses_groups(config):
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    # Left out, a reader would take softmax without a word.
    functions = {"sigmoid": gguf.ExpertGatingFuncType.SIGMOID, "softmax": gguf.ExpertGatingFuncType.SOFTMAX}
    writer.add_expert_gating_func(functions[config.scoring_func])
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)


def _describe_vocabulary(writer: "gguf.GGUFWriter", *, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    import gguf

    if tokenizer is None:
        writer.add_tokenizer_model("none")
        get_logger(__name__).warning("no tokenizer lies beside the weights: the file answers to token ids only")
        return
    definition = tokenizer.definition
    _require_published_rules(definition)
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids and the model {config.vocab_size:,} rows; they are not of "
            "one model"
        )
    spellings = [f"[PAD{token}]" for token in range(config.vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * config.vocab_size
    for spelling, token in definition["model"]["vocab"].items():
        spellings[token], kinds[token] = spelling, gguf.TokenType.NORMAL
    for added in definition["added_tokens"]:
        spellings[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if _controls(added) else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list(spellings)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in definition["model"]["merges"]]
    )
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _controls(added: dict[str, Any]) -> bool:
    text: str = added["content"]
    return added["special"] or any(text.startswith(left) and text.endswith(right) for left, right in BARS)


def _require_published_rules(definition: dict[str, Any]) -> None:
    """Refuse a tokenizer that cuts text otherwise than V3's before it merges: the format can only name known ways."""
    splits = (definition.get("pre_tokenizer") or {}).get("pretokenizers", ())
    rules = tuple(part["pattern"].get("Regex") for part in splits if part["type"] == "Split")
    normalizer = definition.get("normalizer") or {"normalizers": []}
    if definition["model"]["type"] != "BPE" or rules != SPLIT_RULES or normalizer.get("normalizers") != []:
        raise TokenizerError(
            "GGUF names how text is cut before it is merged, and this tokenizer does not cut as DeepSeek-V3's does: "
            "readers would make other tokens of a text. Use a model with V3's tokenizer, or one without any"
        )


def _write(
    writer: "gguf.GGUFWriter",
    path: Path,
    *,
    layout: tuple[GgufTensor, ...],
    read: Callable[[PublishedTensor], Tensor],
    wanted: str,
) -> None:
    import gguf
    import numpy as np

    for tensor in layout:
        kind = _kind_of(tensor, wanted=wanted)
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            _num_bytes(tensor, kind=kind),
            raw_dtype=gguf.GGMLQuantizationType[kind],
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in layout:
        kind = _kind_of(tensor, wanted=wanted)
        stored = np.empty(_num_bytes(tensor, kind=kind), dtype=np.uint8)
        pieces = np.split(stored, len(tensor.parts))
        for part, piece in zip(tensor.parts, pieces, strict=True):
            value = tensor.of_part(read(part)).detach().to("cpu", torch.float32).contiguous()
            _require_range(value, name=part.name, kind=kind)
            quantised = gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType[kind])
            piece[:] = quantised.reshape(-1).view(np.uint8)
        writer.write_tensor_data(stored)
    writer.flush()


def _kind_of(tensor: GgufTensor, *, wanted: str) -> str:
    if tensor.stays_float32:
        return "F32"
    return "F16" if wanted == "Q8_0" and tensor.shape[-1] % BLOCK_OF_Q8_0 else wanted


def _num_bytes(tensor: GgufTensor, *, kind: str) -> int:
    return int(torch.Size(tensor.shape).numel() * BYTES_OF[kind])


def _require_range(value: Tensor, *, name: str, kind: str) -> None:
    """Refuse what FP16 cannot hold: the values of F16, and with Q8_0 the multipliers, a 127th of the values."""
    if kind not in ("F16", "Q8_0"):
        return
    largest = value.abs().max().item() / (127 if kind == "Q8_0" else 1)
    if not largest <= LARGEST_F16:
        raise CheckpointError(
            f"{name} has values that {kind.lower()} cannot hold (NaN, infinity or too large); write f32 or bf16"
        )
