"""The state of a run, from nothing or from a snapshot, and back into one."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.snapshot import OpenSnapshot, Saving, piece_name
from dsv3.checkpoint.snapshot_folder import latest_snapshot, verify_snapshot
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
    ranks.keep_own(model)
    _place(model, device=device, dtype=dtype, in_fp8=config.precision.recipe != "original")
    parameters = dict(model.named_parameters())
    optimizer = AdamW(parameters.items(), config=config.optim, own=ranks.own_rows(parameters))
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


def write_state(state: TrainState, *, folder: Path, data: str) -> Saving:
    """Begin to write everything the next step depends on as a snapshot below `folder`; every rank must.

    Weights are stored as their FP32 masters. There are no random numbers to keep: initial weights, the order of rows
    and FIM follow from the seed and from counts. Of ranks that hold the same, one writes; a snapshot does not say how
    many there were. `data` is a hash of what is trained on.
    """
    first, second = state.optimizer.moments()
    tensors = {"model": state.optimizer.master, "first_moment": first, "second_moment": second}
    counts = {"tokens": state.tokens, "optimizer_steps": state.optimizer.steps, "corpus": data}
    if state.average is not None:
        tensors["average"] = state.average.average
        counts["average_updates"] = state.average.updates
    written = {group: _own_pieces(state, named) for group, named in tensors.items()}
    written["model"] |= {name: buffer for name, buffer in _buffers(state.model).items() if state.ranks.writes(name)}
    return Saving(
        folder,
        step=state.step,
        tensors=written,
        state=counts,
        policy=state.config.snapshot,
        ranks=state.ranks,
        in_background=state.config.snapshot.in_background,
    )


def _own_pieces(state: TrainState, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what this rank writes of tensors that are kept for its own rows, named as pieces where they are."""
    own, pieces = state.ranks.own_rows(state.optimizer.parameters), {}
    for name, tensor in tensors.items():
        if len(tensor) == 0 or not (state.config.parallel.zero or state.ranks.writes(name)):
            continue
        first = state.ranks.first_row(name) + own[name].start
        is_whole = len(tensor) == state.ranks.num_rows(name, here=len(state.optimizer.parameters[name]))
        pieces[name if is_whole else piece_name(name, first=first, end=first + len(tensor))] = tensor
    return pieces


def newest_snapshot(folder: Path, *, ranks: Alone) -> Path | None:
    """Return the newest whole snapshot of a run folder, which the first rank looks for; every rank must ask."""
    return ranks.gather(latest_snapshot(folder / "snapshots") if ranks.rank == 0 else None)[0]


@torch.no_grad()
def take_weights(state: TrainState, *, folder: Path) -> None:
    """Give a new state the weights of another run's newest snapshot, and nothing else of it.

    Raises:
        SnapshotError: there is none, or it is of another model.
    """
    newest = newest_snapshot(folder, ranks=state.ranks)
    if newest is None:
        raise SnapshotError(f"{folder} has no snapshot whose weights could be taken (start_from)")
    snapshot = OpenSnapshot(newest)
    _require_names(snapshot, group="model", wanted=_names_of_model(state), exactly=state.ranks.size == 1)
    state.optimizer.load_weights(_weights(state, snapshot=snapshot))
    _load_buffers(state, snapshot=snapshot)


@torch.no_grad()
def restore_state(state: TrainState, *, path: Path, data: str) -> None:
    """Put a snapshot into a new state, so that the next step is bit for bit the one that would have followed.

    On another number of ranks than it was written on, the order of sums is another.

    Raises:
        SnapshotError: it is damaged, is of another model, or belongs to a run on another corpus.
    """
    if state.ranks.rank == 0:
        verify_snapshot(path)
    snapshot = OpenSnapshot(path)
    counts = snapshot.state
    if counts["corpus"] != data:
        raise SnapshotError(
            f"the data there is now is not what {path} was trained on; put that back, or start another run with "
            "--run FOLDER"
        )
    parameters = state.optimizer.parameters
    groups = ["first_moment", "second_moment", *(["average"] if state.average is not None else [])]
    alone = state.ranks.size == 1  # or there is more in it than this rank holds
    _require_names(snapshot, group="model", wanted=_names_of_model(state), exactly=alone)
    for group in groups:
        _require_names(snapshot, group=group, wanted=parameters, exactly=alone)

    own = state.ranks.own_rows(parameters)

    def read(group: str) -> dict[str, Tensor]:
        return _read_rows(state, snapshot=snapshot, group=group, rows=own)

    state.step, state.tokens = counts["step"], counts["tokens"]
    state.optimizer.load(
        steps=counts["optimizer_steps"],
        weights=_weights(state, snapshot=snapshot),
        first_moment=read("first_moment"),
        second_moment=read("second_moment"),
    )
    _load_buffers(state, snapshot=snapshot)
    if state.average is not None:
        state.average.load(read("average"), updates=counts["average_updates"])


def _read_rows(
    state: TrainState, *, snapshot: OpenSnapshot, group: str, rows: Mapping[str, slice]
) -> dict[str, Tensor]:
    """Return rows of the parameters, counted as they lie here."""
    return {
        name: snapshot.read(group, name, first=state.ranks.first_row(name) + some.start, count=some.stop - some.start)
        for name, some in rows.items()
    }


def _weights(state: TrainState, *, snapshot: OpenSnapshot) -> dict[str, Tensor]:
    """Return the weights that are here, all rows of each."""
    parameters = state.optimizer.parameters
    every = {name: slice(0, len(parameter)) for name, parameter in parameters.items()}
    found = _read_rows(state, snapshot=snapshot, group="model", rows=every)
    for name, tensor in found.items():
        if tensor.shape != parameters[name].shape:
            shapes = f"{list(tensor.shape)} and not {list(parameters[name].shape)}"
            raise SnapshotError(f"{snapshot.path} is of another model: {name} has shape {shapes}")
    return found


def _load_buffers(state: TrainState, *, snapshot: OpenSnapshot) -> None:
    for name, buffer in _buffers(state.model).items():
        buffer.copy_(snapshot.read("model", name))


def _names_of_model(state: TrainState) -> list[str]:
    return [*state.optimizer.parameters, *_buffers(state.model)]


def fingerprint(corpus: PreparedCorpus) -> str:
    """Return a hash of what the corpus says of itself and of its tokenizer: other data, another hash."""
    digest = hashlib.sha256((corpus.folder / "corpus.json").read_bytes())
    digest.update((corpus.tokenizer_folder / "tokenizer.json").read_bytes())
    return digest.hexdigest()


def _buffers(model: Transformer) -> dict[str, Tensor]:
    """Return what the model holds besides parameters: the router biases."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _require_names(snapshot: OpenSnapshot, *, group: str, wanted: Iterable[str], exactly: bool) -> None:
    found = snapshot.names(group)
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted)) if exactly else []
    if missing or unknown:
        lacks = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model has not"
        raise SnapshotError(f"{snapshot.path / group}.safetensors is of another model: it {lacks}")


def whole_model(state: TrainState, *, path: Path) -> Transformer:
    """Return the whole model: the one of the state, or on one of many ranks the one in the snapshot at `path`."""
    if state.ranks.size == 1:
        return state.model
    snapshot = OpenSnapshot(path)
    with torch.device("meta"):
        model = Transformer(state.config.model)
    model.load_state_dict({name: snapshot.read("model", name) for name in snapshot.names("model")}, assign=True)
    return model
