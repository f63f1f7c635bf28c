"""AdamW as the report runs it: FP32 master weights and gradients, moments in BF16 (report 3.3, 4.2).

The moments are kept in one flat buffer a stretch. On a CPU our own kernel reads them, steps and rounds them back in
one pass; elsewhere they are widened into FP32 scratch, stepped by torch's fused AdamW, and rounded back.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dsv3 import native
from dsv3.config import OptimConfig
from dsv3.errors import ConfigError
from dsv3.fp8.formats import is_fp8

STRETCH_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Weights stepped together: on a CPU two FP32 scratch moments of 4 MB each, measured best of 64K to 4M elements."""


@dataclass(frozen=True, kw_only=True)
class _Stretch:
    """Consecutive pieces of the flattened weights, stepped with one kernel."""

    pieces: list[tuple[str, int, int]]
    """Name of the parameter, first and last element (exclusive)."""
    first_moment: Float[Tensor, " element"]
    second_moment: Float[Tensor, " element"]
    decays: bool
    """Whether weight decay applies."""

    def places(self) -> Iterator[tuple[str, int, int, slice]]:
        """Yield each piece and where its moments lie in those of the stretch."""
        offset = 0
        for name, start, end in self.pieces:
            yield name, start, end, slice(offset, offset + end - start)
            offset += end - start

    def with_gradients(self, master: Mapping[str, Tensor], *, gradients: Mapping[str, Tensor]) -> "list[_Piece]":
        """Return the pieces whose parameters have a gradient."""
        return [
            _Piece(weight=master[name].view(-1)[start:end], gradient=gradients[name][start:end], moments=here)
            for name, start, end, here in self.places()
            if name in gradients
        ]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Consecutive elements of one parameter."""

    weight: Float[Tensor, " element"]
    gradient: Float[Tensor, " element"]
    moments: slice
    """Where its moments lie in those of the stretch."""


class AdamW:
    """AdamW over named parameters. Weight decay is decoupled, and skips parameters with fewer than two dims.

    A parameter in FP32 is its own master copy; one of a narrower type gets a separate FP32 master, from which it is
    rounded after each step, and an FP32 buffer that sums the gradients of micro-batches.

    Raises:
        ConfigError: a parameter is in FP8.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], *, config: OptimConfig) -> None:
        self.config = config
        self.steps = 0
        named = dict(parameters)
        in_fp8 = [name for name, parameter in named.items() if is_fp8(parameter)]
        if in_fp8:
            raise ConfigError(
                f"{len(in_fp8):,} weights are in FP8, such as {in_fp8[0]}: these are for use only, since a step is "
                "smaller than what FP8 rounds away. Load the model with dtype 'float32' or 'bfloat16' to train it"
            )
        self.parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        self.master = {
            name: parameter.data if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self.parameters.items()
        }
        self._summed: dict[str, Tensor] = {}
        self._stretches = self._lay_out()

    def _lay_out(self) -> list[_Stretch]:
        stretches = []
        for decays in (True, False):
            queue: list[tuple[str, int, int]] = []
            room = 0
            device = torch.device("cpu")
            for name, weight in self.master.items():
                if (weight.dim() >= 2) is not decays:
                    continue
                start = 0
                while start < weight.numel():
                    if room == 0 or weight.device != device:
                        stretches += self._stretch(queue, decays=decays, device=device)
                        queue, device = [], weight.device
                        room = STRETCH_ELEMENTS.get(device.type, STRETCH_ELEMENTS["cpu"])
                    end = min(start + room, weight.numel())
                    queue.append((name, start, end))
                    room -= end - start
                    start = end
            stretches += self._stretch(queue, decays=decays, device=device)
        return stretches

    def _stretch(self, pieces: list[tuple[str, int, int]], *, decays: bool, device: torch.device) -> list[_Stretch]:
        size = sum(end - start for _, start, end in pieces)
        if size == 0:
            return []
        kind = torch.bfloat16 if self.config.bf16_moments else torch.float32
        moments = [torch.zeros(size, dtype=kind, device=device) for _ in range(2)]
        return [_Stretch(pieces=pieces, first_moment=moments[0], second_moment=moments[1], decays=decays)]

    @torch.no_grad()
    def accumulate(self) -> None:
        """Move the gradients of a micro-batch into FP32. FP32 parameters need nothing: autograd adds in place."""
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32 and parameter.grad is not None:
                if name not in self._summed:
                    self._summed[name] = torch.zeros_like(self.master[name])
                self._summed[name] += parameter.grad
                parameter.grad = None

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The FP32 gradients summed so far, of the parameters that have any."""
        own = {name: p.grad for name, p in self.parameters.items() if p.grad is not None and p.dtype == torch.float32}
        return own | self._summed

    def forget_gradients(self) -> None:
        """Drop all gradients."""
        self._summed = {}
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def divide_gradients(self, scale: float) -> None:
        """Undo a loss scale."""
        if scale != 1:
            torch._foreach_mul_(list(self.gradients.values()), 1 / scale)

    @torch.no_grad()
    def step(self, *, learning_rate: float, gradient_norm: float) -> None:
        """Take one step, with gradients scaled down to a norm of at most `clip_gradient_norm`.

        `gradient_norm` is that of all gradients of all ranks, asked for first so that a step that must not be taken
        is not.
        A parameter without a gradient is left as it is.
        """
        gradients = {name: gradient.reshape(-1) for name, gradient in self.gradients.items()}
        scale = min(1.0, self.config.clip_gradient_norm / max(gradient_norm, torch.finfo(torch.float32).tiny))
        step = _step_by_kernel if native.usable(*self.master.values(), *gradients.values()) else _step_by_torch
        for stretch in self._stretches:
            pieces = stretch.with_gradients(self.master, gradients=gradients)
            if pieces:
                step(stretch, pieces=pieces, steps=self.steps, scale=scale, rate=learning_rate, config=self.config)
        self.steps += 1
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                parameter.copy_(self.master[name])

    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return both moments by parameter name, in the type they are kept in: what a snapshot stores."""
        found = []
        for kind in ("first_moment", "second_moment"):
            flat = {name: torch.empty(weight.numel(), dtype=self._kind) for name, weight in self.master.items()}
            for stretch in self._stretches:
                for name, start, end, here in stretch.places():
                    flat[name][start:end] = getattr(stretch, kind)[here].cpu()
            found.append({name: moment.view(self.master[name].shape) for name, moment in flat.items()})
        return found[0], found[1]

    @property
    def _kind(self) -> torch.dtype:
        return torch.bfloat16 if self.config.bf16_moments else torch.float32

    @torch.no_grad()
    def load(
        self,
        *,
        steps: int,
        master: Mapping[str, Tensor],
        first_moment: Mapping[str, Tensor],
        second_moment: Mapping[str, Tensor],
    ) -> None:
        """Continue from a snapshot: weights, moments and the number of steps taken. Parameters follow their master."""
        self.steps = steps
        for name, weight in self.master.items():
            weight.copy_(master[name])
            self.parameters[name].copy_(weight)
        for stretch in self._stretches:
            for name, start, end, here in stretch.places():
                stretch.first_moment[here] = first_moment[name].reshape(-1)[start:end].to(stretch.first_moment)
                stretch.second_moment[here] = second_moment[name].reshape(-1)[start:end].to(stretch.second_moment)


def _step_by_kernel(
    stretch: _Stretch, *, pieces: list[_Piece], steps: int, scale: float, rate: float, config: OptimConfig
) -> None:
    decay = config.weight_decay if stretch.decays else 0.0
    for piece in pieces:
        native.call(
            "adamw_step",
            piece.weight,
            piece.gradient,
            stretch.first_moment[piece.moments],
            stretch.second_moment[piece.moments],
            int(config.bf16_moments),
            piece.weight.numel(),
            scale,
            rate,
            config.beta1,
            config.beta2,
            1 - config.beta1 ** (steps + 1),
            (1 - config.beta2 ** (steps + 1)) ** 0.5,
            config.epsilon,
            1 - rate * decay,
        )


def _step_by_torch(
    stretch: _Stretch, *, pieces: list[_Piece], steps: int, scale: float, rate: float, config: OptimConfig
) -> None:
    first, second = stretch.first_moment.float(), stretch.second_moment.float()
    slopes = [piece.gradient for piece in pieces]
    adamw(
        [piece.weight for piece in pieces],
        list(torch._foreach_mul(slopes, scale)) if scale < 1 else slopes,
        [first[piece.moments] for piece in pieces],
        [second[piece.moments] for piece in pieces],
        max_exp_avg_sqs=[],
        state_steps=[torch.tensor(float(steps), device=slope.device) for slope in slopes],
        fused=True,
        amsgrad=False,
        beta1=config.beta1,
        beta2=config.beta2,
        lr=rate,
        weight_decay=config.weight_decay if stretch.decays else 0.0,
        eps=config.epsilon,
        maximize=False,
    )
    if stretch.first_moment.dtype != torch.float32:
        stretch.first_moment.copy_(first)
        stretch.second_moment.copy_(second)
