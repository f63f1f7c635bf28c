"""The cache of latent attention, allocated and counted, beside what other kinds of attention would keep."""

import torch

from dsv3.config import ModelConfig
from dsv3.infer.paged_cache import PagedLatentCache
from dsv3.infer.runner import TorchRunner
from dsv3.model.transformer import Transformer
from dsv3.plan.counts import kv_bytes_per_token
from dsv3.recipes import tiny, v3_671b
from dsv3.report.bars import Group, draw_bars
from dsv3.reproduce.experiment import Ask, Outcome, Picture
from dsv3.reproduce.finding import Finding, Number, Order

BF16 = 2
PAGE_TOKENS, PAGES = 64, 2
GQA_GROUPS = 8
"""Heads of keys and values of the models that the others are checked by, and of most published ones."""
PUBLISHED = {
    # layers, heads of keys and values, width of a key and of a value; bytes a token as published
    "Qwen2.5-72B (GQA)": (80, 8, 128, 128, 327_680),
    "LLaMA-3.1-405B (GQA)": (126, 8, 128, 128, 516_096),
}
"""Shapes from their config.json; bytes from 'Insights into DeepSeek-V3', table 1."""


def run(ask: Ask) -> Outcome:
    """Allocate, count, compare."""
    model = v3_671b().model
    measured = allocated_bytes_per_token(model)
    others = {
        "MHA": attention_bytes_per_token(model, heads=model.num_attention_heads),
        f"GQA, {GQA_GROUPS} groups": attention_bytes_per_token(model, heads=GQA_GROUPS),
        "MQA": attention_bytes_per_token(model, heads=1),
    }
    insights = "'Insights into DeepSeek-V3', table 1"
    checks = {name: bytes_per_token(layers, heads=heads, key=key, value=value) for name, (layers, heads, key, value, _)
              in PUBLISHED.items()}  # fmt: skip
    engine_bytes = engine_bytes_per_token(tiny().model)
    draw_bars(
        [
            Group(name=name.replace(" (", "\n("), values=(value / 1e3,))
            for name, value in {"MLA": measured, **others, **checks}.items()
        ],
        labels=("kB a token, BF16",),
        title="Cache of a token: V3's shape with each kind of attention, and two published models",
        y_label="kB a token",
        is_logarithmic=True,
        file=ask.folder / "cache.png",
    )
    findings: list[Finding] = [
        Number(
            claim="bytes a token, allocated by our engine at V3's shape",
            report=f"70.272 KB ({insights})",
            expected=70_272,
            value=measured,
        ),
        Number(
            claim="bytes a token of an engine that runs a small model",
            report="(d_c + d_h^R) x layers x 4 bytes (2.1.1)",
            expected=kv_bytes_per_token(tiny().model, bytes_per_value=4, mtp_modules=1),
            value=engine_bytes,
        ),
        *(
            Number(
                claim=f"bytes a token of {name}, by the formula",
                report=insights,
                expected=PUBLISHED[name][4],
                value=value,
            )
            for name, value in checks.items()
        ),
        *(
            Number(
                claim=f"{name} keeps so many times as much as V3",
                report=f"{times}x ({insights})",
                expected=times,
                value=checks[name] / measured,
                tolerance=0.01,
            )
            for name, times in (("Qwen2.5-72B (GQA)", 4.66), ("LLaMA-3.1-405B (GQA)", 7.28))
        ),
        *(
            Order(
                claim=f"bytes a token: MLA below {name} of the same width",
                report="a cache far below MHA's (2.1.1)",
                lower=(float(measured),),
                higher=(float(value),),
            )
            for name, value in others.items()
            if name != "MQA"
        ),
        Number(
            claim="MLA keeps as much as GQA with so many groups",
            report="2.25 groups (V2 report, Table 1)",
            expected=2.25,
            value=measured / others["MQA"] * (model.qk_head_dim + model.v_head_dim) / (2 * model.qk_nope_head_dim),
        ),
    ]
    return Outcome(
        findings=tuple(findings),
        pictures=(Picture(file="cache.png", caption="Bytes that one token takes in the cache; a logarithmic scale."),),
        settings={"page_tokens": PAGE_TOKENS, "shape": "v3_671b"},
        data={"MLA, allocated": measured, **others, **checks},
        remark="MQA keeps less than MLA; what it costs in quality is in the V2 report's appendix and was not made "
        "again here. Our engine has no other attention than MLA, so that the others are counted and not allocated. "
        "Heads of V3's width have keys of 192 and values of 128; the 2.25 groups of the V2 report are of 128 and 128.",
    )


def allocated_bytes_per_token(config: ModelConfig) -> int:
    """Return what our engine's cache takes of memory for a token, in BF16, at a model's shape."""
    cache = PagedLatentCache(
        config, num_pages=PAGES, page_tokens=PAGE_TOKENS, num_mtp_modules=0, dtype=torch.bfloat16, device="cpu"
    )
    return cache.storage.untyped_storage().nbytes() // (PAGES * PAGE_TOKENS)


def engine_bytes_per_token(config: ModelConfig) -> int:
    """Return what the cache of a model that runs takes for a token in FP32, its MTP modules' part included."""
    runner = TorchRunner(Transformer(config))
    runner.make_pages(num_pages=PAGES, page_tokens=PAGE_TOKENS)
    pages = runner.read_pages(range(PAGES))
    return pages.numel() * pages.element_size() // (PAGES * PAGE_TOKENS)


def attention_bytes_per_token(config: ModelConfig, *, heads: int) -> int:
    """Return what V3 would keep in BF16 if each of so many heads had keys and values of its own."""
    return bytes_per_token(config.num_hidden_layers, heads=heads, key=config.qk_head_dim, value=config.v_head_dim)


def bytes_per_token(layers: int, *, heads: int, key: int, value: int) -> int:
    """Return the bytes of a cache of keys and values in BF16."""
    return layers * heads * (key + value) * BF16
