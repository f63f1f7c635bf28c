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
from dsv3.ops import on_gpu

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

    A parameter in FP32 (or FP64) is its own master copy; one of a narrower type gets a separate FP32 master, from which
    it is rounded after each step, and an FP32 buffer that sums the gradients of micro-batches.

    `own` names the rows of each parameter that are stepped here, where others step the rest (ZeRO-1): masters and
    moments are of these alone.

    Raises:
        ConfigError: a parameter is in FP8.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        config: OptimConfig,
        own: Mapping[str, slice] | None = None,
    ) -> None:
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
        self._own = {name: slice(None) for name in self.parameters} | dict(own or {})
        self.master = {
            name: parameter.data[self._own[name]]
            if _is_wide(parameter)
            else parameter.detach()[self._own[name]].float()
            for name, parameter in self.parameters.items()
        }
        self._summed: dict[str, Tensor] = {}
        self._stretches = self._lay_out()

    def _lay_out(self) -> list[_Stretch]:
        stretches = []
        for decays in (True, False):
            queue: list[tuple[str, int, int]] = []
            room = 0
            device, dtype = torch.device("cpu"), torch.float32
            for name, weight in self.master.items():
                if (weight.dim() >= 2) is not decays:
                    continue
                start = 0
                while start < weight.numel():
                    if room == 0 or (weight.device, weight.dtype) != (device, dtype):
                        stretches += self._stretch(queue, decays=decays, device=device)
                        queue, device, dtype = [], weight.device, weight.dtype
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
        """Move the gradients of a micro-batch into FP32. Wide parameters need nothing: autograd adds in place."""
        for name, parameter in self.parameters.items():
            if not _is_wide(parameter) and parameter.grad is not None:
                if name not in self._summed:
                    self._summed[name] = torch.zeros_like(parameter, dtype=torch.float32)
                self._summed[name] += parameter.grad
                parameter.grad = None

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The FP32 gradients summed so far, of the parameters that have any, and of all their rows."""
        wide = {name: p.grad for name, p in self.parameters.items() if p.grad is not None and _is_wide(p)}
        return wide | self._summed

    @property
    def own_gradients(self) -> dict[str, Tensor]:
        """The same, of the rows that are stepped here."""
        return {name: gradient[self._own[name]] for name, gradient in self.gradients.items()}

    def make_zero_gradients(self, names: Iterable[str]) -> None:
        """Give parameters gradients of zero."""
        for name in names:
            parameter = self.parameters[name]
            if _is_wide(parameter):
                parameter.grad = torch.zeros_like(parameter)
            else:
                self._summed[name] = torch.zeros_like(parameter, dtype=torch.float32)

    def forget_gradients(self) -> None:
        """Drop all gradients."""
        self._summed = {}
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def divide_gradients(self, scale: float) -> None:
        """Undo a loss scale."""
        if scale != 1:
            torch._foreach_mul_(list(self.own_gradients.values()), 1 / scale)

    @torch.no_grad()
    def step(self, *, learning_rate: float, gradient_norm: float) -> None:
        """Take one step, with gradients scaled down to a norm of at most `clip_gradient_norm`.

        `gradient_norm` is that of all gradients of all ranks, asked for first so that a step that must not be taken
        is not.
        A parameter without a gradient is left as it is.
        """
        gradients = {name: gradient.reshape(-1) for name, gradient in self.own_gradients.items()}
        scale = min(1.0, self.config.clip_gradient_norm / max(gradient_norm, torch.finfo(torch.float32).tiny))
        step = _step_by_torch
        if native.usable(*self.master.values(), *gradients.values()):
            step = _step_by_kernel
        elif on_gpu.usable(*self.master.values(), *gradients.values()):
            step = _step_on_gpu
        for stretch in self._stretches:
            pieces = stretch.with_gradients(self.master, gradients=gradients)
            if pieces:
                step(stretch, pieces=pieces, steps=self.steps, scale=scale, rate=learning_rate, config=self.config)
        self.steps += 1
        for name, parameter in self.parameters.items():
            if not _is_wide(parameter):
                parameter[self._own[name]].copy_(self.master[name])

    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return both moments of the own rows by parameter name, in the type they are kept in."""
        found = []
        for kind in ("first_moment", "second_moment"):
            flat = {name: torch.empty(weight.numel(), dtype=self._kind) for name, weight in self.master.items()}
            for stretch in self._stretches:
                for name, start, end, here in stretch.places():
                    flat[name][start:end] = getattr(stretch, kind)[here].cpu()
            found.append({name: moment.view(self.master[name].shape) for name, moment in flat.items()})
        return found[0], found[1]

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights, in FP32, all rows of each; moments stay as they are."""
        for name, weight in self.master.items():
            self.parameters[name].copy_(weights[name])
            weight.copy_(weights[name][self._own[name]])

    @property
    def _kind(self) -> torch.dtype:
        return torch.bfloat16 if self.config.bf16_moments else torch.float32

    @torch.no_grad()
    def load(
        self,
        *,
        steps: int,
        weights: Mapping[str, Tensor],
        first_moment: Mapping[str, Tensor],
        second_moment: Mapping[str, Tensor],
    ) -> None:
        """Continue from a snapshot: all weights in FP32, the moments of the own rows, and the number of steps taken."""
        self.steps = steps
        self.load_weights(weights)
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


def _step_on_gpu(
    stretch: _Stretch, *, pieces: list[_Piece], steps: int, scale: float, rate: float, config: OptimConfig
) -> None:
    for piece in pieces:
        on_gpu.adamw(
            piece.weight,
            gradient=piece.gradient,
            first_moment=stretch.first_moment[piece.moments],
            second_moment=stretch.second_moment[piece.moments],
            scale=scale,
            rate=rate,
            beta1=config.beta1,
            beta2=config.beta2,
            steps=steps,
            epsilon=config.epsilon,
            weight_decay=config.weight_decay if stretch.decays else 0.0,
        )


def _step_by_torch(
    stretch: _Stretch, *, pieces: list[_Piece], steps: int, scale: float, rate: float, config: OptimConfig
) -> None:
    dtype = pieces[0].weight.dtype
    first, second = stretch.first_moment.to(dtype), stretch.second_moment.to(dtype)
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
    if stretch.first_moment.dtype != dtype:
        stretch.first_moment.copy_(first)
        stretch.second_moment.copy_(second)


def _is_wide(parameter: Tensor) -> bool:
    """Whether a parameter is stepped as it is."""
    return parameter.dtype in (torch.float32, torch.float64)
