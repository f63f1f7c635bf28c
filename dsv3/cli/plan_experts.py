"""dsv3 plan experts: how evenly experts load their devices, with and without copies."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dsv3.cli.columns import aligned
from dsv3.errors import ConfigError, DataError
from dsv3.plan.expert_balance import Balance, Devices, Layers, balances, drawn_loads, slots_for

REDUNDANCY = (0.0, 0.125, 0.25)
"""Copies as a share of the experts; 32 of 256 are the published production's."""
DRAWN = "drawn"


def register_plan_experts(plan_app: typer.Typer) -> None:
    """Add the verb below `dsv3 plan`."""
    plan_app.command("experts")(experts)


def experts(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="What `dsv3 eval domains --json` printed; drawn loads when left out."),
    ] = None,
    known: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The same kinds of text recorded before: experts are placed for these loads."
        ),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices that share the experts of a layer.")] = 32,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of these; whole groups of experts stay on one.")] = 1,
    groups: Annotated[int, typer.Option(min=1, help="Groups of node-limited routing.")] = 1,
    redundant: Annotated[
        list[float] | None, typer.Option(min=0, help="Copies as a share of the experts; 0, 0.125 and 0.25.")
    ] = None,
    num_experts: Annotated[int, typer.Option("--experts", min=1, help="Of a layer, where loads are drawn.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Layers of which loads are drawn.")] = 58,
    skew: Annotated[float, typer.Option(min=0, help="Of drawn loads: deviation of their logarithm.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of drawn loads.")] = 0,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it as a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the largest load of a device beside the mean: experts in order, and placed by load with copies.

    A table for traffic that experts were placed for, and one for each kind of it where they were placed for all
    together: what placing them anew is worth when traffic turns. Without --known they are placed for the very loads
    that they meet, which is the best that could be.
    """
    loads = (
        read_loads(file)
        if file
        else {DRAWN: drawn_loads(num_experts=num_experts, num_layers=layers, skew=skew, seed=seed)}
    )
    where = Devices(num_devices=devices, num_nodes=nodes, num_groups=groups)
    if known and not file:
        raise ConfigError(f"--known {known} says what experts were placed for; give what they meet, too: FILE")
    placed_for = read_loads(known) if known else loads
    held = len(next(iter(loads.values()))[0])
    # Shares that come to the same slots are one.
    shares = tuple({slots_for(held, share=one, num_devices=devices): one for one in redundant or REDUNDANCY}.values())
    found = balances(loads, devices=where, redundancy=shares, known=placed_for)
    if picture is not None:
        from dsv3.report.expert_balance import draw_balance

        draw_balance(found, loads=loads, known=placed_for, devices=where, redundancy=shares, file=picture)
    if as_json:
        rows = [asdict(balance) | {"mean": balance.mean, "worst": balance.worst} for balance in found]
        typer.echo(json.dumps({"devices": asdict(where), "redundancy": shares, "balances": rows}))
        return
    num_layers = len(next(iter(loads.values())))
    typer.echo(_text(found, shares=shares, num_experts=held, num_layers=num_layers, devices=devices))
    if not file:
        typer.echo(f"assumption: loads are drawn, lognormal with skew {skew:g}; the published skew is not known")


def read_loads(file: Path) -> dict[str, Layers]:
    """Return the loads of each domain, as `dsv3 eval domains --json` prints them.

    Raises:
        DataError: the file cannot be read, or has none.
        ConfigError: it has no domains.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        loads: dict[str, Layers] = {
            str(domain["name"]): [[float(load) for load in layer] for layer in domain["relative"]]
            for domain in found["domains"]
        }
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} has no loads of experts ({type(error).__name__}: {error}); make it with: "
            f"dsv3 eval domains MODEL --json > {file}"
        ) from error
    if not loads:
        raise ConfigError(f"{file} has no domains; make it of two kinds of text or more")
    return loads


def _text(found: Sequence[Balance], *, shares: Sequence[float], num_experts: int, num_layers: int, devices: int) -> str:
    copies = [slots_for(num_experts, share=share, num_devices=devices) - num_experts for share in shares]
    head = ["", "in order", *(f"{number} copies ({number / num_experts:.1%})" for number in copies)]
    told = [f"largest load of {devices} devices beside the mean; over {num_layers} layers the mean (the worst)"]
    for together in (False, True):
        rows = [
            [name, *(f"{one.mean:.2f} ({one.worst:.2f})" for one in row)]
            for name, row in _rows(found, together=together).items()
        ]
        if rows and len(rows[0]) > 2:
            told += ["", "placed for all traffic together" if together else "placed for this traffic"]
            told += [f"  {row}" for row in aligned([head, *rows])]
    return "\n".join(told)


def _rows(found: Sequence[Balance], *, together: bool) -> dict[str, list[Balance]]:
    rows: dict[str, list[Balance]] = {}
    for one in found:
        if one.placed_for is None or (one.placed_for != one.traffic) == together:
            rows.setdefault(one.traffic, []).append(one)
    return rows
