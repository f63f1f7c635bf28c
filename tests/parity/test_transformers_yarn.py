"""YaRN as transformers has it, to the last of the published 163,840 positions."""

import pytest
import torch
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig, YarnConfig
from dsv3.model.mla import LatentAttention
from dsv3.ops.rope import rope_amplitude, rope_frequencies, rotate, rotation_at, softmax_scale

TOLERANCE = 1e-4
LAST = 163_839
CONFIG = ModelConfig(
    hidden_size=96,
    num_attention_heads=4,
    q_lora_rank=48,
    kv_lora_rank=64,
    rope_scaling=YarnConfig(),
)
"""The published heads, 128 + 64 and 128 wide, and the published YaRN; fewer of them, in a narrower model."""


@pytest.fixture(scope="module")
def theirs():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    config = DeepseekV3Config(
        hidden_size=CONFIG.hidden_size,
        num_attention_heads=CONFIG.num_attention_heads,
        num_key_value_heads=CONFIG.num_attention_heads,
        q_lora_rank=CONFIG.q_lora_rank,
        kv_lora_rank=CONFIG.kv_lora_rank,
        max_position_embeddings=LAST + 1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return DeepseekV3Attention(config, layer_idx=0).eval(), DeepseekV3RotaryEmbedding(config)


@pytest.fixture(scope="module")
def positions() -> Tensor:
    """From the first to the last: where rows begin, around the lengths of training, and anywhere between."""
    some = torch.randint(0, LAST, (160,), generator=torch.Generator().manual_seed(1))
    edges = torch.tensor([0, 1, 2, 4095, 4096, 4097, 32_767, 32_768, 131_071, 131_072, LAST - 1, LAST])
    return torch.cat((some, edges)).unique()


def test_frequencies_scale_and_amplitude_are_theirs(theirs):
    attention, rotary = theirs
    torch.testing.assert_close(rope_frequencies(CONFIG), rotary.inv_freq, rtol=1e-6, atol=0)
    assert rope_amplitude(CONFIG) == pytest.approx(rotary.attention_scaling, rel=1e-12)
    assert softmax_scale(CONFIG) == pytest.approx(attention.scaling, rel=1e-12)


def test_scores_at_every_position_are_theirs(theirs, positions):
    """Of rope parts alone, which is where positions are."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    _, rotary = theirs
    query, key = torch.randn(2, len(positions), 1, 64, generator=torch.Generator().manual_seed(2))
    cos, sin = rotary(query, positions[None])
    q, k = apply_rotary_pos_emb_interleave(query[None].transpose(1, 2), key[None].transpose(1, 2), cos, sin)
    expected = (q @ k.transpose(-1, -2))[0, 0]

    rotation = rotation_at(positions, frequencies=rope_frequencies(CONFIG), amplitude=rope_amplitude(CONFIG))
    scores = rotate(query, rotation=rotation)[:, 0] @ rotate(key, rotation=rotation)[:, 0].T
    assert (scores - expected).norm() < TOLERANCE * expected.norm()
    assert (scores - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_attention_over_all_positions_is_theirs(theirs, positions):
    attention, rotary = theirs
    ours = LatentAttention(CONFIG, layer=0)
    ours.load_state_dict(attention.state_dict())
    hidden = torch.randn(len(positions), CONFIG.hidden_size, generator=torch.Generator().manual_seed(3))
    mask = torch.full((len(positions), len(positions)), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        expected = attention(hidden[None], position_embeddings=rotary(hidden, positions[None]), attention_mask=mask)[0]
        got = ours(
            hidden,
            batch=TokenBatch(
                tokens=torch.zeros_like(positions),
                positions=positions,
                starts=torch.tensor([0, len(positions)]),
                first_positions=(0,),
            ),
            rotation=rotation_at(positions, frequencies=rope_frequencies(CONFIG), amplitude=rope_amplitude(CONFIG)),
            cache=None,
        )
    errors = (got - expected[0]).norm(dim=-1) / expected[0].norm(dim=-1)
    assert errors.max() < TOLERANCE
