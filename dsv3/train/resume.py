"""The state of a run, from nothing or from a snapshot, and back into one."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.snapshot import read_snapshot, save_snapshot
from dsv3.config import PretrainConfig
from dsv3.data.prepared import PreparedCorpus
from dsv3.errors import SnapshotError
from dsv3.model.transformer import Transformer
from dsv3.parallel.ranks import Alone
from dsv3.runtime.device import choose_device, choose_dtype
from dsv3.runtime.seed import make_generator
from dsv3.train.ema import WeightAverage
from dsv3.train.optimizer import AdamW
from dsv3.train.step import TrainState


def new_state(config: PretrainConfig, *, ranks: Alone | None = None) -> TrainState:
    """Return the state of a run before its first step: random weights from `runtime.seed`, nothing seen.

    They are the same weights on any number of ranks, of which each keeps what it is to hold.
    """
    ranks = ranks or Alone()
    device = choose_device(config.runtime.device)
    dtype = choose_dtype(config.runtime.dtype, device=device)
    model = Transformer(config.model)
    model.init_weights(generator=make_generator(config.runtime.seed, stream="weights"))
    ranks.deal_out_experts(model)
    _place(model, device=device, dtype=dtype, in_fp8=config.precision.recipe != "original")
    optimizer = AdamW(model.named_parameters(), config=config.optim)
    decay = config.optim.ema_decay
    average = WeightAverage(optimizer.master, decay=decay) if decay else None
    return TrainState(config=config, model=model, optimizer=optimizer, average=average, ranks=ranks)


@torch.no_grad()
def _place(model: Transformer, *, device: torch.device, dtype: torch.dtype, in_fp8: bool) -> None:
    """Move a model to its device and compute type.

    Weights that will be quantised stay in FP32: they are their own masters, nothing computes with them as they are, and
    their gradients are summed in FP32.
    """
    wide = {weight for weight, _ in model.weights_in_fp8()} if in_fp8 else set()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device=device, dtype=torch.float32 if parameter in wide else dtype)
    for buffer in model.buffers():  # router biases, FP32 always
        buffer.data = buffer.data.to(device)


def write_state(state: TrainState, *, folder: Path, corpus: PreparedCorpus) -> Path:
    """Write everything the next step depends on as a snapshot below `folder`, and return its path.

    Weights are stored as their FP32 masters. There are no random numbers to keep: initial weights, the order of rows
    and FIM follow from the seed and from counts. Of several ranks the first writes, with the experts of all, so that a
    snapshot does not know how many there were; the others come back when it has.
    """
    first, second = state.optimizer.moments()
    tensors = {"model": state.optimizer.master, "first_moment": first, "second_moment": second}
    counts = {"tokens": state.tokens, "optimizer_steps": state.optimizer.steps, "corpus": fingerprint(corpus)}
    if state.average is not None:
        tensors["average"] = state.average.average
        counts["average_updates"] = state.average.updates
    whole = {group: state.ranks.whole_experts(named) for group, named in tensors.items()}
    whole["model"] |= _buffers(state.model)
    path = None
    if state.ranks.rank == 0:
        path = save_snapshot(folder, step=state.step, tensors=whole, state=counts, policy=state.config.snapshot)
    return state.ranks.gather(path)[0]


@torch.no_grad()
def restore_state(state: TrainState, *, path: Path, corpus: PreparedCorpus) -> None:
    """Put a snapshot into a new state, so that the next step is bit for bit the one that would have followed.

    On another number of ranks than it was written on, the order of sums is another.

    Raises:
        SnapshotError: it is damaged, is of another model, or belongs to a run on another corpus.
    """
    tensors, counts = read_snapshot(path)
    if counts["corpus"] != fingerprint(corpus):
        raise SnapshotError(
            f"the corpus in {corpus.folder} is not the one that {path} was trained on; put that corpus back, or start "
            "another run with --run FOLDER"
        )
    wanted = {"model": [*state.optimizer.master, *_buffers(state.model)]}
    wanted |= {group: list(state.optimizer.master) for group in ("first_moment", "second_moment")}
    if state.average is not None:
        wanted["average"] = list(state.average.average)
    for group, names in wanted.items():
        _require_names(path, group=group, found=tensors.get(group, {}), wanted=names)

    state.step, state.tokens = counts["step"], counts["tokens"]
    own = {group: state.ranks.own_experts(tensors[group]) for group in wanted}
    state.optimizer.load(
        steps=counts["optimizer_steps"],
        master=own["model"],
        first_moment=own["first_moment"],
        second_moment=own["second_moment"],
    )
    for name, buffer in _buffers(state.model).items():
        buffer.copy_(tensors["model"][name])
    if state.average is not None:
        state.average.load(own["average"], updates=counts["average_updates"])


def fingerprint(corpus: PreparedCorpus) -> str:
    """Return a hash of what the corpus says of itself and of its tokenizer: other data, another hash."""
    digest = hashlib.sha256((corpus.folder / "corpus.json").read_bytes())
    digest.update((corpus.tokenizer_folder / "tokenizer.json").read_bytes())
    return digest.hexdigest()


def _buffers(model: Transformer) -> dict[str, Tensor]:
    """Return what the model holds besides parameters: the router biases."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _require_names(path: Path, *, group: str, found: dict[str, Tensor], wanted: Iterable[str]) -> None:
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        lacks = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model has not"
        raise SnapshotError(f"{path / group}.safetensors is of another model: it {lacks}")


def whole_model(state: TrainState) -> Transformer | None:
    """Return the model with the experts of all ranks, on the first of them; every rank must ask."""
    if state.ranks.size == 1:
        return state.model
    tensors = {name: tensor.detach() for name, tensor in state.model.state_dict().items()}
    whole = state.ranks.whole_experts(tensors)
    if state.ranks.rank != 0:
        return None
    with torch.device("meta"):
        model = Transformer(state.config.model)
    model.load_state_dict(whole, assign=True)
    return model
