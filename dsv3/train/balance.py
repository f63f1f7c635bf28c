"""Keeping experts evenly loaded: the losses of V3 and V2, and the bias that made most of them unnecessary.

The bias rule has no gradient and the losses have no memory; both read what `Routing` returned. The router of an MTP
module is treated as every other (the report does not say; serving engines carry a bias for it).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.config import BalanceConfig, ModelConfig
from dsv3.model.interfaces import ModelOutput, Routing
from dsv3.model.router import Router


def balance_loss(
    output: ModelOutput,
    *,
    config: BalanceConfig,
    model_config: ModelConfig,
    num_sequences: int,
    whole_batch_counts: Sequence[Int[Tensor, " expert"]] | None = None,
) -> Float[Tensor, ""]:
    """Return the balance loss of one micro-batch, weighted, and summed over all MoE layers, MTP modules included.

    `num_sequences` counts those of the WHOLE batch, so that the losses of its micro-batches add up to the mean over
    sequences, however it was cut. Under 'batch_loss' the frequencies f of eq. 18 are those of the whole batch too:
    with several micro-batches they must be counted beforehand (`plain_top_k_counts`) and passed in, one for each
    layer; left out, this micro-batch is taken for the whole.

    Source: report 2.1.2, eq. 17-20; 4.5.3 for 'batch_loss'; V2 report 2.2.3 for 'v2_losses'.
    """
    total = output.hidden.new_zeros((), dtype=torch.float32)
    for layer, (routing, batch) in enumerate(zip(output.routings, output.routed_batches, strict=True)):
        if config.method == "bias" and config.sequence_loss_weight:
            loss = sequence_loss(routing, batch=batch, num_sequences=num_sequences)
            total = total + config.sequence_loss_weight * loss
        elif config.method == "sequence_loss":
            loss = sequence_loss(routing, batch=batch, num_sequences=num_sequences)
            total = total + config.auxiliary_loss_weight * loss
        elif config.method == "batch_loss":
            counts = plain_top_k_counts(routing) if whole_batch_counts is None else whole_batch_counts[layer]
            total = total + config.auxiliary_loss_weight * batch_loss(routing, counts=counts)
        elif config.method == "v2_losses":
            total = total + v2_losses(
                routing, batch=batch, config=config, model_config=model_config, num_sequences=num_sequences
            )
    return total


def sequence_loss(routing: Routing, *, batch: TokenBatch, num_sequences: int) -> Float[Tensor, ""]:
    """Return sum over sequences of sum_i f_i P_i, divided by `num_sequences`: 1 when load is perfectly even.

    f counts the plain top-K of the unbiased scores, without groups or bias, so it is not the load (eq. 18); it is
    piecewise constant and passes no gradient. P is the mean over the tokens of one sequence of scores divided by
    their sum (eq. 19, 20). That the batch takes the mean over sequences is implied, not written.
    """
    num_experts, top_k = routing.affinity.shape[1], routing.experts.shape[1]
    frequency = _frequency_by_row(_plain_top_k(routing), batch=batch, num_columns=num_experts)
    share = _mean_by_row(_normalised(routing.affinity), batch=batch)
    return (frequency * share).sum() * (num_experts / top_k / num_sequences)


def batch_loss(routing: Routing, *, counts: Int[Tensor, " expert"]) -> Float[Tensor, ""]:
    """Return this micro-batch's part of sum_i f_i P_i with T the tokens of the whole batch (report 4.5.3).

    `counts` are those of the plain top-K over the whole batch. The parts of all micro-batches add up to the loss.
    """
    num_experts, top_k = routing.affinity.shape[1], routing.experts.shape[1]
    num_tokens = counts.sum() / top_k
    frequency = counts * (num_experts / (top_k * num_tokens))
    return (frequency * _normalised(routing.affinity).sum(0)).sum() / num_tokens


@torch.no_grad()
def plain_top_k_counts(routing: Routing) -> Int[Tensor, " expert"]:
    """Return how often each expert is among the K best of the unbiased scores: eq. 18 before it is divided."""
    return torch.bincount(_plain_top_k(routing).flatten(), minlength=routing.affinity.shape[1])


def v2_losses(
    routing: Routing,
    *,
    batch: TokenBatch,
    config: BalanceConfig,
    model_config: ModelConfig,
    num_sequences: int,
) -> Float[Tensor, ""]:
    """Return the weighted expert, device and communication losses of V2; a device is a group of experts.

    Unlike V3's loss, f counts the experts that were really chosen. Scores are divided by their sum, which changes
    nothing for V2's softmax and lets a sigmoid router be compared.

    Source: V2 report 2.2.3, alpha_1 to alpha_3; D = `n_group`, M = `topk_group`.
    """
    num_experts, top_k = routing.affinity.shape[1], routing.experts.shape[1]
    num_devices = model_config.n_group
    devices_per_token = model_config.topk_group if model_config.topk_method != "greedy" else num_devices
    per_device = num_experts // num_devices

    share = _mean_by_row(_normalised(routing.affinity), batch=batch)
    frequency = _frequency_by_row(routing.experts, batch=batch, num_columns=num_experts) * (num_experts / top_k)
    device_share = share.unflatten(1, (num_devices, per_device)).sum(2)
    device_frequency = frequency.unflatten(1, (num_devices, per_device)).mean(2)
    sent = torch.zeros(routing.experts.shape[0], num_devices, device=share.device)
    sent.scatter_(1, routing.experts // per_device, 1.0)
    sent_frequency = _mean_by_row(sent, batch=batch) * (num_devices / devices_per_token)
    if batch.shared is not None:
        sent_frequency = batch.shared.total(sent_frequency)

    weighted = (
        config.expert_loss_weight * (frequency * share).sum()
        + config.device_loss_weight * (device_frequency * device_share).sum()
        + config.communication_loss_weight * (sent_frequency * device_share).sum()
    )
    return weighted / num_sequences


@torch.no_grad()
def update_router_biases(routers: Sequence[Router], *, loads: Sequence[Int[Tensor, " expert"]], speed: float) -> None:
    """Move each router's bias by `speed`: up for experts below the mean load, down above, not at all on it.

    `loads` must be those of the whole batch, all micro-batches and ranks together: the rule is about a step, and
    sees only its sign. Biases are not centred; only their differences matter.

    Source: report 2.1.2, 'Auxiliary-Loss-Free Load Balancing'; arXiv 2408.15664, algorithm 1.
    """
    if speed == 0.0:
        return
    for router, load in zip(routers, loads, strict=True):
        bias = router.e_score_correction_bias
        assert bias is not None, "the configuration refuses balance by bias for routers that have none"
        # sign(mean - c) in whole numbers, so that an expert exactly on the mean is seen to be there.
        direction = torch.sign(load.sum() - load * load.shape[0])
        bias.add_(direction.to(bias), alpha=speed)


def max_violation(load: Int[Tensor, " expert"]) -> float:
    """Return MaxVio = (max load - mean load) / mean load of one layer: 0 when even (arXiv 2408.15664)."""
    mean = load.double().mean().item()
    return load.max().item() / mean - 1 if mean else 0.0


def _normalised(affinity: Float[Tensor, "token expert"]) -> Float[Tensor, "token expert"]:
    # Not in the report: a floor, so that a token whose sigmoid scores are all 0 in FP32 has no NaN gradient.
    return affinity / affinity.sum(1, keepdim=True).clamp(min=torch.finfo(affinity.dtype).tiny)


def _plain_top_k(routing: Routing) -> Int[Tensor, "token chosen"]:
    return routing.affinity.detach().topk(routing.experts.shape[1], dim=1, sorted=False).indices


def _row_of_token(batch: TokenBatch) -> Int[Tensor, " token"]:
    if batch.shared is not None:
        return batch.shared.row_of_token.to(batch.tokens.device)
    index = torch.repeat_interleave(torch.arange(len(batch.lengths)), batch.starts.diff())
    return index.to(batch.tokens.device)


def _row_lengths(batch: TokenBatch) -> Int[Tensor, " row"]:
    lengths = batch.lengths if batch.shared is None else batch.shared.row_lengths
    return torch.tensor(lengths, device=batch.tokens.device).clamp(min=1)


def _mean_by_row(values: Float[Tensor, "token column"], *, batch: TokenBatch) -> Float[Tensor, "row column"]:
    """Return the mean over the tokens of each row; of a row that ranks share, this rank's part of it."""
    if batch.shared is None and batch.row_length is not None:
        return values.unflatten(0, (len(batch.lengths), batch.row_length)).mean(1)
    sums = values.new_zeros(batch.num_rows, values.shape[1]).index_add(0, _row_of_token(batch), values)
    return sums / _row_lengths(batch).to(values)[:, None]


def _frequency_by_row(
    chosen: Int[Tensor, "token chosen"], *, batch: TokenBatch, num_columns: int
) -> Float[Tensor, "row column"]:
    """Return how many tokens of each row, on all ranks, chose each column, divided by the row's length."""
    cell = _row_of_token(batch)[:, None] * num_columns + chosen
    counts = torch.bincount(cell.flatten(), minlength=batch.num_rows * num_columns).view(batch.num_rows, num_columns)
    if batch.shared is not None:
        counts = batch.shared.total(counts)
    return counts / _row_lengths(batch)[:, None]
