"""What pre-training minimises: next token, further tokens (MTP) and even expert load (report 2.1.2, 2.2).

L = L_main + (lambda / D) sum_k L^k_MTP + L_Bal
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from dsv3.batch import IGNORE, TokenBatch
from dsv3.config import BalanceConfig
from dsv3.model.interfaces import ModelOutput
from dsv3.model.transformer import Transformer
from dsv3.ops.cross_entropy import linear_cross_entropy
from dsv3.train.balance import balance_loss


@dataclass(frozen=True, kw_only=True)
class WholeBatch:
    """What a micro-batch must know of the batch it belongs to, so that cutting a batch changes memory, not results."""

    num_targets: int
    """Trained targets of the main model in all micro-batches: T of eq. 24, times the number of rows."""
    num_sequences: int
    """Sequences in all micro-batches."""
    plain_top_k: Sequence[Int[Tensor, " expert"]] | None = None
    """For each layer, how often each expert is among the plain top-K over the whole batch; for 'batch_loss' alone."""

    @classmethod
    def of(cls, batches: Sequence[TokenBatch]) -> "WholeBatch":
        """Count over all micro-batches of a step."""
        return cls(
            num_targets=sum(num_trained(batch) for batch in batches),
            # Of a row that ranks share, the one that has its beginning counts it.
            num_sequences=sum(batch.firsts.count(0) for batch in batches),
        )


@dataclass(frozen=True, kw_only=True)
class LossParts:
    """The share of one micro-batch in each part of the loss; the shares of all micro-batches add up to the loss."""

    total: Float[Tensor, ""]
    """What is differentiated."""
    next_token: Float[Tensor, ""]
    """Nats a target."""
    mtp: tuple[Float[Tensor, ""], ...]
    """L^k_MTP for each depth, before lambda / D; a sum over T - k targets divided by T, so a little below the mean."""
    balance: Float[Tensor, ""]
    """Weighted, as it enters the total."""


def pretraining_loss(
    model: Transformer,
    *,
    output: ModelOutput,
    batch: TokenBatch,
    whole: WholeBatch,
    mtp_weight: float,
    balance: BalanceConfig,
    is_last: bool = True,
) -> LossParts:
    """Return the loss of one micro-batch as its share of the whole batch's.

    `output` may be of some layers alone, which with `is_last` False are not those that the head reads: then all they
    add is the balance loss of their own experts.

    Every MTP module divides by the number of the MAIN model's targets, though it has one fewer a row and depth
    (eq. 24: 1/T before a sum over T - k terms). Main model and MTP modules share the output head.

    Source: report 2.2, eq. 24-25; the plain sum of the three parts is implied.
    """
    even = balance_loss(
        output,
        config=balance,
        model_config=model.config,
        num_sequences=whole.num_sequences,
        whole_batch_counts=whole.plain_top_k,
    )
    if not is_last:
        return LossParts(total=even, next_token=even.new_zeros(()), mtp=(), balance=even)
    next_token = _cross_entropy(model, hidden=output.hidden, batch=batch) / whole.num_targets
    mtp = tuple(_cross_entropy(model, hidden=one.hidden, batch=one.batch) / whole.num_targets for one in output.mtp)
    total = next_token + even
    for part in mtp:
        total = total + mtp_weight / len(mtp) * part
    return LossParts(total=total, next_token=next_token, mtp=mtp, balance=even)


def num_trained(batch: TokenBatch) -> int:
    """Return how many targets of a batch are trained on."""
    assert batch.targets is not None, "a training batch has targets"
    return int((batch.targets != IGNORE).sum())


def _cross_entropy(
    model: Transformer, *, hidden: Float[Tensor, "token hidden"], batch: TokenBatch
) -> Float[Tensor, ""]:
    assert batch.targets is not None, "a training batch has targets"
    return linear_cross_entropy(hidden, weight=model.lm_head.weight, targets=batch.targets, weights=batch.weights)
