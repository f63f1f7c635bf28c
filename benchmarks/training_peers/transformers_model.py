"""transformers' DeepseekV3ForCausalLM, with each expert implementation that trains on a CPU.

`batched_mm` copies an expert's weights for each token and does not finish. Attention is `sdpa`, its fastest here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from training_peers.sizes import Size
from training_peers.system import PeerSystem
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3.config.published import published_from_model_config


def build(size: Size, *, experts: str, compiled: bool) -> PeerSystem:
    """Return the model with an optimizer; `compiled` compiles forward pass, loss and backward pass whole."""
    published = published_from_model_config(size.model, dtype="float32")
    config = DeepseekV3Config(**published, attn_implementation="sdpa", experts_implementation=experts)
    model = DeepseekV3ForCausalLM(config).train()

    def loss_of(rows: Tensor) -> Tensor:
        logits = model(input_ids=rows[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    return PeerSystem(model, loss_of=torch.compile(loss_of) if compiled else loss_of)


MODES = {
    "eager experts": lambda size: build(size, experts="eager", compiled=False),
    "grouped_mm": lambda size: build(size, experts="grouped_mm", compiled=False),
    "grouped_mm, compiled": lambda size: build(size, experts="grouped_mm", compiled=True),
}
