"""What training must know of a model whose layers lie on several ranks."""

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig
from dsv3.model.interfaces import ModelOutput
from dsv3.model.precision import Precision
from dsv3.model.transformer import Transformer, routed_places
from dsv3.parallel.ranks import Alone


def room_for(model: Transformer, batch: TokenBatch) -> Float[Tensor, "token hidden"]:
    """Return memory for the hidden states of a batch."""
    return torch.empty(batch.num_tokens, model.config.hidden_size, dtype=model.dtype, device=model.device)


def places_of(output: ModelOutput, *, layers: range, model: ModelConfig) -> list[int]:
    """Return the place in the whole model's routings of each that `layers` have made, MTP modules included."""
    end = layers.stop if layers.stop < model.num_hidden_layers else layers.stop + model.num_nextn_predict_layers
    return list(routed_places(model, layers=range(layers.start, end)).values())[: len(output.routings)]


def forward_by_stages(
    model: Transformer, *, batch: TokenBatch, ranks: Alone, precision: Precision | None = None, mtp: bool = True
) -> list[tuple[range, ModelOutput]]:
    """Run a batch through all stages, on whichever ranks they are; return those that are here and what they made."""
    return ranks.run_forward(
        lambda layers, hidden: model.steps(
            batch, hidden=hidden, layers=layers, dispatch=ranks.dispatch, precision=precision, mtp=mtp
        ),
        num_layers=model.config.num_hidden_layers,
        room=lambda _: room_for(model, batch),
    )
