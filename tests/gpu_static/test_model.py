"""The whole model where a GPU would run it: one training pass with MTP, one decoding step, in BF16 and in FP8."""

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig, PrecisionConfig
from dsv3.infer.paged_cache import PagedLatentCache
from dsv3.model.precision import Precision, quantise_weights
from dsv3.model.transformer import Transformer
from dsv3.ops import recompute
from dsv3.ops.cross_entropy import linear_cross_entropy

pytest.importorskip("triton")

# The smallest sizes that are whole tiles of 128 wherever V3's are; the latent with its rope key is not, as in V3.
CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=256,
    moe_intermediate_size=128,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=1,
)
POSITION = 70
"""As `AnswerFromDevice` has it."""

precisions = pytest.mark.parametrize("recipe", ["original", "fp8_v3"])


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """Choose kernels as on an H100, and know a tensor without memory by its storage instead of its address."""
    from dsv3.fp8 import gpu
    from dsv3.model import precision

    monkeypatch.setattr(gpu, "why_no_scaled_mm", lambda: None)
    monkeypatch.setattr(precision, "kernels_for", lambda device: gpu.GpuKernels())
    monkeypatch.setattr(recompute, "_memory", lambda tensor: tensor.untyped_storage()._cdata)


def model_on(device: str, *, recipe: str) -> tuple[Transformer, Precision]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Transformer(CONFIG)
    finally:
        torch.set_default_dtype(torch.float32)
    return model, quantise_weights(model.weights_in_fp8(), config=PrecisionConfig(recipe=recipe))


def loss_of(model: Transformer, *, batch: TokenBatch, **settings: object) -> torch.Tensor:
    output = model(batch, mtp=True, **settings)
    assert (output.hidden.dtype, tuple(output.hidden.shape)) == (torch.bfloat16, (128, 256))
    assert tuple(output.mtp[0].hidden.shape) == (126, 256)
    ends = ((output.hidden, batch), (output.mtp[0].hidden, output.mtp[0].batch))
    return sum(linear_cross_entropy(hidden, weight=model.lm_head.weight, targets=read.targets) for hidden, read in ends)


@precisions
def test_training_forward_stays_on_the_gpu(fake_gpu, on_gpu, dispatch, scaled_mm, rows_of_64, recipe):
    model, precision = model_on("cuda", recipe=recipe)
    loss = loss_of(model, batch=on_gpu(rows_of_64), dispatch=dispatch, precision=precision)
    assert (loss.device.type, loss.dtype, loss.dim()) == ("cuda", torch.float32, 0)
    assert loss.requires_grad
    assert ("BlockWise128x128" in scaled_mm) == (recipe == "fp8_v3")


@precisions
def test_absorbed_decoding_stays_on_the_gpu(fake_gpu, on_gpu, dispatch, one_more_token, recipe):
    model, precision = model_on("cuda", recipe=recipe)
    paged = PagedLatentCache(
        CONFIG, num_pages=8, page_tokens=64, num_mtp_modules=0, dtype=torch.bfloat16, device="cuda"
    )
    pages = [list(range(4)), list(range(4, 8))]
    with torch.no_grad():
        batch = on_gpu(one_more_token)
        cache = paged.bound_to(pages, batch=batch)
        output = model(batch, cache=cache, dispatch=dispatch, precision=precision)
        logits = model.logits(output.hidden)
    assert (logits.device.type, logits.dtype, tuple(logits.shape)) == ("cuda", torch.float32, (2, 512))
    assert batch.ends == (POSITION + 1, POSITION + 1)


@precisions
def test_gradients_have_the_shapes_and_types_of_their_weights(meta, dispatch, scaled_mm, rows_of_64, recipe):
    """On the meta device, since autograd sets a CUDA device up before it walks back."""
    model, precision = model_on("meta", recipe=recipe)
    loss_of(model, batch=rows_of_64.to("meta"), dispatch=dispatch, precision=precision).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert (weight.grad.shape, weight.grad.dtype) == (weight.shape, weight.dtype), name
    if recipe == "fp8_v3":
        assert set(scaled_mm) == {"BlockWise128x128", "BlockWise1x128"}


@pytest.fixture
def rows_of_64() -> TokenBatch:
    with unset_fake_temporarily():
        return TokenBatch.from_rows(torch.zeros(2, 65, dtype=torch.long))


@pytest.fixture
def one_more_token() -> TokenBatch:
    """The next token of two sequences of which `POSITION` are cached."""
    with unset_fake_temporarily():
        return TokenBatch(
            tokens=torch.zeros(2, dtype=torch.long), positions=torch.full((2,), POSITION), starts=torch.arange(3)
        )
