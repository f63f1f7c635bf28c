"""`dsv3 inspect`: what a recipe, a run or a published model amounts to, at once and without torch."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3 import recipes
from dsv3.config import ModelConfig, PretrainConfig
from dsv3.config.files import read_config, read_json, to_dict
from dsv3.config.override import apply_overrides
from dsv3.config.published import model_config_from_published
from dsv3.errors import ConfigError
from dsv3.plan.activations import activation_memory, kept_of_tokens
from dsv3.plan.counts import (
    ParameterCounts,
    count_parameters,
    decode_flops_per_token,
    kv_bytes_per_token,
    layer_counts,
    mtp_training_flops_per_token,
    prefill_flops_per_token,
    training_flops_per_token,
    training_flops_per_token_not_causal,
)
from dsv3.plan.memory import WEIGHT_PRECISIONS, training_memory, weight_bytes
from dsv3.plan.published_tensors import checkpoint_size
from dsv3.recipes.differences import LEFT_OPEN, differences
from dsv3.train.schedule import total_steps

PUBLISHED_SEQUENCE_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is inspected: a model, and the run that trains it where there is one."""

    model: ModelConfig
    run: PretrainConfig | None
    notes: tuple[str, ...]
    """What had to be assumed to read it."""


@dataclass(frozen=True, kw_only=True)
class _PublishedModel:
    """Gives a published model's settings the names they have within a run, so that `--set model.x=y` fits both."""

    model: ModelConfig


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("inspect")
    def inspect(
        what: Annotated[
            str,
            typer.Argument(
                metavar="WHAT", help="A recipe, a run folder, or a config.json (of a run or a published model)."
            ),
        ],
        assignments: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="NAME=VALUE", help="Change a setting first; may be repeated."),
        ] = None,
        context: Annotated[
            int | None, typer.Option(min=1, help="Tokens of context for cache and inference; by default the longest.")
        ] = None,
        against: Annotated[
            str | None,
            typer.Option(metavar="report", help="Instead: list every setting that is not as published, and why."),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    ) -> None:
        """Count parameters, FLOPs, cache and memory, and show the schedule of a recipe, run or model."""
        subject = find_subject(what, assignments=assignments or [])
        if against is not None and context is not None:
            raise ConfigError(
                "--context means nothing beside --against, which compares settings; leave one of them out"
            )
        if against is not None:
            findings = compare(subject, against=against)
            typer.echo(json.dumps(findings, indent=2)) if as_json else _show_comparison(findings, what=what)
            return
        findings = examine(subject, context=context)
        typer.echo(json.dumps(findings, indent=2)) if as_json else _show(findings, what=what)


def find_subject(what: str, *, assignments: list[str]) -> Subject:
    """Return what `what` names: a recipe before a file, with the assignments of `--set` applied.

    Raises:
        ConfigError: neither a recipe nor a file or folder with settings.
    """
    path = Path(what).expanduser()
    if what not in recipes.names() and path.exists():
        return _read_subject(path / "config.json" if path.is_dir() else path, assignments=assignments)
    if what not in recipes.names() and ("/" in what or what.endswith(".json")):
        raise ConfigError(f"there is no file or folder {what}; the recipes are {', '.join(recipes.names())}")
    run = apply_overrides(recipes.by_name(what), assignments=assignments)
    return Subject(model=run.model, run=run, notes=())


def _read_subject(path: Path, *, assignments: list[str]) -> Subject:
    values = read_json(path)
    if "model_type" not in values and "architectures" not in values:
        run = apply_overrides(read_config(path), assignments=assignments)
        return Subject(model=run.model, run=run, notes=())
    model, notes = model_config_from_published(values)
    changed = apply_overrides(_PublishedModel(model=model), assignments=assignments)
    return Subject(model=changed.model, run=None, notes=tuple(notes))


def examine(subject: Subject, *, context: int | None) -> dict[str, Any]:
    """Return every finding as plain data: what `--json` prints. Counts are exact; bytes and FLOPs are whole numbers."""
    model = subject.model
    length = subject.run.batch.sequence_length if subject.run else PUBLISHED_SEQUENCE_LENGTH
    context = context or model.max_position_embeddings
    if context > model.max_position_embeddings:
        raise ConfigError(
            f"a context of {context} was asked for, but model.max_position_embeddings = {model.max_position_embeddings}"
        )
    findings: dict[str, Any] = {
        "parameters": _parameters(count_parameters(model)),
        "parameters_of_one": asdict(layer_counts(model)),
        "cache": {
            "bytes_per_token": kv_bytes_per_token(model),
            "bytes_per_token_with_mtp": kv_bytes_per_token(model, mtp_modules=model.num_nextn_predict_layers),
            "context": context,
            "bytes_of_context": context * kv_bytes_per_token(model),
        },
        "flops_per_token": {
            "sequence_length": length,
            "training": training_flops_per_token(model, sequence_length=length),
            "training_not_causal": training_flops_per_token_not_causal(model, sequence_length=length),
            "training_at_context": training_flops_per_token(model, sequence_length=context),
            "training_mtp": mtp_training_flops_per_token(model, sequence_length=length),
            "prefill_of_context": prefill_flops_per_token(model, context=context),
            "decode_at_context": decode_flops_per_token(model, context=context),
        },
        "weight_bytes": {precision: weight_bytes(model, precision=precision) for precision in WEIGHT_PRECISIONS},
        "published_format": {
            "bfloat16": asdict(checkpoint_size(model, fp8=False)),
            "fp8": asdict(checkpoint_size(model, fp8=True)),
        },
        "notes": list(subject.notes),
    }
    if subject.run is not None:
        findings["training_memory_bytes"] = {
            dtype: asdict(memory) | {"on_device": memory.on_device}
            for dtype in ("float32", "bfloat16")
            for memory in [training_memory(subject.run, dtype=dtype)]
        }
        findings["activation_bytes"] = _activations(subject.run, context=context)
        findings["schedule"] = schedule(subject.run)
        findings["settings"] = to_dict(subject.run)
    else:
        findings["settings"] = {"model": to_dict(model)}
    return findings


def schedule(config: PretrainConfig) -> dict[str, Any]:
    """Return length and milestones of a run, each in tokens and in the first step that starts at or after it."""
    rate, batch = config.optim.learning_rate, config.batch
    events = [(batch.ramp_tokens, f"batch reaches {batch.final_sequences} sequences")]
    if rate.cosine_until_tokens > rate.constant_until_tokens:
        events.append((rate.constant_until_tokens, f"learning rate leaves {rate.peak:g} by a cosine"))
    events.append((rate.cosine_until_tokens, f"learning rate reaches {rate.cosine_floor:g}"))
    events.append((rate.hold_until_tokens, f"learning rate drops to {rate.final:g}"))
    if config.model.num_nextn_predict_layers:
        weights = f"{config.mtp.early_weight:g} to {config.mtp.late_weight:g}"
        events.append((config.mtp.switch_tokens, f"weight of the MTP loss goes from {weights}"))
    if config.balance.method == "bias":
        events.append((config.balance.bias_freeze_tokens, "router biases freeze"))
    milestones = [
        {"step": 1 + _steps_until(config, tokens=tokens), "tokens": tokens, "event": event}
        for tokens, event in sorted(events)
        if 0 < tokens < config.total_tokens
    ]
    return {
        "total_tokens": config.total_tokens,
        "total_steps": total_steps(config),
        "first_batch_tokens": batch.start_sequences * batch.sequence_length,
        "final_batch_tokens": batch.final_sequences * batch.sequence_length,
        "warmup_steps": rate.warmup_steps,
        "milestones": milestones,
        "never_reached": [event for tokens, event in sorted(events) if tokens >= config.total_tokens],
        "total_flops": config.total_tokens
        * (
            training_flops_per_token(config.model, sequence_length=batch.sequence_length)
            + mtp_training_flops_per_token(config.model, sequence_length=batch.sequence_length)
        ),
    }


def _activations(config: PretrainConfig, *, context: int) -> dict[str, Any]:
    kept = activation_memory(config)
    tokens = config.batch.micro_batch_sequences * config.batch.sequence_length
    return asdict(kept) | {
        "per_token": kept.per_token,
        "micro_batch_tokens": tokens,
        "of_micro_batch": tokens * kept.per_token + kept.per_pass,
        "row_tokens": context,
        "row_ranks": config.parallel.context,
        "of_row": kept_of_tokens(config, tokens=context),
    }


def compare(subject: Subject, *, against: str) -> dict[str, Any]:
    """Return every setting that differs from the published recipe with its reason, and what the report leaves open."""
    if against != "report":
        raise ConfigError(f"--against '{against}' is not known; settings can be compared with 'report'")
    if subject.run is None:
        raise ConfigError("a published model's config.json has no training settings to compare; name a recipe or a run")
    values = json.loads(json.dumps([asdict(difference) for difference in differences(subject.run)]))
    settings = to_dict(subject.run)
    return {
        "recipe": subject.run.recipe,
        "differences": values,
        "left_open_by_the_report": [
            {"key": key, "value": _look_up(settings, key=key), "remark": remark} for key, remark in LEFT_OPEN.items()
        ],
    }


def _steps_until(config: PretrainConfig, *, tokens: int) -> int:
    return total_steps(replace(config, total_tokens=tokens))


def _look_up(values: dict[str, Any], *, key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values


def _parameters(counts: ParameterCounts) -> dict[str, int]:
    derived = (
        "total",
        "active",
        "active_with_embedding",
        "active_without_embedding_or_head",
        "mtp_with_copies",
        "mtp_active_with_copies",
        "total_with_mtp_copies",
    )
    return asdict(counts) | {name: getattr(counts, name) for name in derived}


def _show(findings: dict[str, Any], *, what: str) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for note in findings["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print(_parameter_table(findings, what=what))
    console.print(_cost_table(findings))
    if "schedule" in findings:
        console.print(_memory_table(findings))
        console.print(_activation_table(findings))
        _show_schedule(findings["schedule"], console=console)


def _parameter_table(findings: dict[str, Any], *, what: str) -> Any:
    counts = findings["parameters"]
    table = _table(f"{what}: parameters", columns=("", "stored", "active for a token"))
    for name in ("embedding", "head", "attention", "dense_mlp", "shared_experts", "routed_experts", "routers"):
        active = {"embedding": 0, "routed_experts": counts["routed_experts_active"]}.get(name, counts[name])
        table.add_row(name.replace("_", " "), f"{counts[name]:,}", f"{active:,}")
    table.add_row("router biases", f"{counts['router_biases']:,}", f"{counts['router_biases']:,}")
    table.add_row("norms", f"{counts['norms']:,}", f"{counts['norms']:,}", end_section=True)
    table.add_row("main model", f"{counts['total']:,}", f"{counts['active']:,}", style="bold")
    table.add_row("  counting the embedding as active", "", f"{counts['active_with_embedding']:,}")
    table.add_row("  counting neither embedding nor head", "", f"{counts['active_without_embedding_or_head']:,}")
    if counts["mtp_modules"]:
        name = f"MTP ({counts['mtp_modules']} module{'s' if counts['mtp_modules'] > 1 else ''})"
        table.add_row(name, f"{counts['mtp']:,}", f"{counts['mtp_active']:,}", style="bold")
        table.add_row(
            "  with copies of embedding and head",
            f"{counts['mtp_with_copies']:,}",
            f"{counts['mtp_active_with_copies']:,}",
        )
        table.add_row("main model and MTP with copies", f"{counts['total_with_mtp_copies']:,}", "")
    return table


def _cost_table(findings: dict[str, Any]) -> Any:
    cache, flops, fp8 = findings["cache"], findings["flops_per_token"], findings["published_format"]["fp8"]
    context, length = f"{cache['context']:,}", f"{flops['sequence_length']:,}"
    table = _table("cost", columns=("", ""))
    table.add_row("latent cache of a token, BF16", f"{cache['bytes_per_token']:,} B")
    table.add_row(f"  of {context} tokens", _size(cache["bytes_of_context"]), end_section=True)
    table.add_row(f"training FLOPs per token at {length} (causal)", _amount(flops["training"]))
    table.add_row("  counting masked scores too", _amount(flops["training_not_causal"]))
    table.add_row(f"  at {context}", _amount(flops["training_at_context"]))
    if flops["training_mtp"]:
        table.add_row("  MTP on top", _amount(flops["training_mtp"]))
    table.add_row(f"prefill FLOPs per token, mean over {context}", _amount(flops["prefill_of_context"]))
    table.add_row(f"decode FLOPs per token after {context}", _amount(flops["decode_at_context"]), end_section=True)
    for precision, label in (("float32", "FP32"), ("bfloat16", "BF16"), ("fp8", "FP8 blocks as published")):
        table.add_row(f"weights with MTP, {label}", _size(findings["weight_bytes"][precision]))
    table.add_row("published FP8 checkpoint", f"{fp8['num_bytes']:,} B")
    table.add_row("  tensors in it", f"{fp8['tensors']:,}")
    return table


def _memory_table(findings: dict[str, Any]) -> Any:
    memory = findings["training_memory_bytes"]
    recipe = findings["settings"]["precision"]["recipe"]
    columns = ("", "FP32", "BF16") if recipe == "original" else ("", "FP8 and FP32", "FP8 and BF16")
    table = _table("training memory, without activations", columns=columns)
    table.caption = f"precision.recipe={recipe}"
    rows = {
        "weights": "weights",
        "master": "FP32 master weights",
        "gradients": "gradients",
        "moments": "AdamW moments",
        "on_device": "on all devices together",
        "average": "weight average, in CPU memory",
    }
    for name, label in rows.items():
        style = "bold" if name == "on_device" else ""
        table.add_row(label, _size(memory["float32"][name]), _size(memory["bfloat16"][name]), style=style)
    return table


def _activation_table(findings: dict[str, Any]) -> Any:
    kept, recompute = findings["activation_bytes"], findings["settings"]["recompute"]
    recipe = findings["settings"]["precision"]["recipe"]
    number = "FP32" if recipe == "original" else f"{recipe} and FP32"
    table = _table(f"kept from forward to backward pass, {number} with our CPU kernels", columns=("", "a token"))
    for name in ("attention", "dense_mlp", "routed_experts", "shared_experts", "routers", "around"):
        label = "residual stream, norms, head" if name == "around" else name.replace("_", " ")
        table.add_row(label, f"{kept[name]:,} B")
    table.add_row("all", f"{kept['per_token']:,} B", style="bold")
    table.add_row("besides, for the gradients of the head", _size(kept["per_pass"]))
    table.add_row(f"a micro-batch of {kept['micro_batch_tokens']:,} tokens", _size(kept["of_micro_batch"]))
    ranks = kept["row_ranks"]
    shared = f", on each of {ranks} ranks" if ranks > 1 else ""
    table.add_row(f"a row of {kept['row_tokens']:,} tokens{shared}", _size(kept["of_row"]))
    again = [name.replace("_", "-") for name, chosen in recompute.items() if chosen]
    table.caption = f"made again in the backward pass: {', '.join(again) or 'nothing'} (recompute.*)"
    table.caption_justify = "left"
    return table


def _show_schedule(found: dict[str, Any], *, console: Any) -> None:
    table = _table("schedule", columns=("step", "tokens", ""))
    table.columns[2].justify = "left"
    first, final = found["first_batch_tokens"], found["final_batch_tokens"]
    table.add_row(
        "1", "0", f"starts with {first:,} tokens a step; learning rate rises over {found['warmup_steps']} steps"
    )
    for milestone in found["milestones"]:
        table.add_row(f"{milestone['step']:,}", f"{milestone['tokens']:,}", milestone["event"])
    ending = f"ends; {final:,} tokens in a full step; {found['total_flops']:.3g} FLOPs in all"
    table.add_row(f"{found['total_steps']:,}", f"{found['total_tokens']:,}", ending)
    console.print(table)
    for event in found["never_reached"]:
        console.print(f"note: the run ends before this: {event}", markup=False)


def _show_comparison(findings: dict[str, Any], *, what: str) -> None:
    """Print differences that share a reason together, under their reason."""
    entries = findings["differences"]
    if not entries:
        typer.echo(f"{what}: every setting is as published.")
    key_width = max((len(entry["key"]) for entry in entries), default=0)
    value_width = min(24, max((len(_plain(entry["value"])) for entry in entries), default=0))
    by_reason: dict[str, list[str]] = {}
    for entry in entries:
        values = f"{_plain(entry['value']):>{value_width}}   published {_plain(entry['published'])}"
        by_reason.setdefault(entry["reason"], []).append(f"  {entry['key']:<{key_width}}  {values}")
    for reason, lines in by_reason.items():
        typer.secho(f"\n{reason}", bold=True)
        typer.echo("\n".join(lines))
    typer.secho("\nLeft open by the report; what stands here:", bold=True)
    for entry in findings["left_open_by_the_report"]:
        typer.echo(f"  {entry['key']} = {_plain(entry['value'])}: {entry['remark']}")


def _table(title: str, *, columns: tuple[str, ...]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", show_header=any(columns))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    return table


def _plain(value: Any) -> str:
    """Return a value for reading: whole numbers with separators, absent ones as null."""
    if isinstance(value, bool | None | list | dict):
        return json.dumps(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _amount(flops: int) -> str:
    """Return FLOPs with a unit that leaves one to three digits before the point."""
    for unit, size in (("TFLOPs", 10**12), ("GFLOPs", 10**9), ("MFLOPs", 10**6)):
        if flops >= size:
            return f"{flops / size:.2f} {unit}"
    return f"{flops:,} FLOPs"


def _size(num_bytes: int) -> str:
    """Return bytes in decimal units, as disks and the report count."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"
