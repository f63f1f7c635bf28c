"""Ways to tell a model of positions beyond those it was trained on, to be compared with YaRN (report 4.3).

    none      positions go on as they are: angles that training has never shown
    linear    every angle is divided by s, so that all are known ones, and neighbours harder to tell apart
    ntk       the base of the frequencies grows, so that the slowest is divided by s and the fastest is left alone
    yarn      frequencies that turn often are left alone, slow ones divided by s, and scores are sharpened

Source: YaRN (arXiv 2309.00071), section 3, which names where the first three come from.
"""

from dataclasses import replace

from dsv3.config import YarnConfig
from dsv3.errors import ConfigError
from dsv3.model.mla import LatentAttention
from dsv3.model.transformer import Transformer
from dsv3.ops.rope import rope_frequencies, softmax_scale

SCALINGS = ("none", "linear", "ntk", "yarn")


def scale_positions(model: Transformer, *, scaling: str, factor: float, trained: int) -> None:
    """Let a model see positions up to `factor` times the `trained` ones in one of these ways, weights as they are.

    What its configuration says of YaRN no longer counts.

    Raises:
        ConfigError: an unknown way.
    """
    if scaling not in SCALINGS:
        raise ConfigError(f"positions scaled by '{scaling}'; choose of {', '.join(SCALINGS)}")
    config, pairs = replace(model.config, rope_scaling=None), model.config.qk_rope_head_dim // 2
    if scaling == "ntk" and pairs > 1:
        # theta_k = base^(-k / pairs): the last one, k = pairs - 1, is to be divided by s.
        config = replace(config, rope_theta=config.rope_theta * factor ** (pairs / (pairs - 1)))
    elif scaling == "yarn" and factor > 1:
        config = replace(config, rope_scaling=YarnConfig(factor=factor, original_max_position_embeddings=trained))
    frequencies = rope_frequencies(config)
    model.amplitude = 1.0
    model.frequencies = frequencies / factor if scaling == "linear" else frequencies
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.scale = softmax_scale(config)
