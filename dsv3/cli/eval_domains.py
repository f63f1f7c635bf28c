"""dsv3 eval domains: what a model does differently with each kind of text."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer

from dsv3.cli.columns import aligned
from dsv3.errors import ConfigError

if TYPE_CHECKING:
    from dsv3.evals.acceptance import Acceptance
    from dsv3.evals.specialisation import DomainLoad

DEFAULT_MAX_TOKENS = 200_000


def domains(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A run folder, an export folder, or a published checkpoint's folder."),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Text of one domain; two or more, or the held-out text of a run's sources."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens read at most, of all.")] = DEFAULT_MAX_TOKENS,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens the model sees at once; the length of its training rows.")
    ] = None,
    answers: Annotated[
        int | None,
        typer.Option(min=0, help="Texts of each that are gone on with, for MTP's drafts; 32 where there is a module."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of these; 0 always takes the likeliest token.")] = 0.8,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the experts' loads as a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes all that this process may use.")] = 0,
) -> None:
    """Show which experts each kind of text goes to, and how often what MTP drafts for it is right.

    'apart' is the share of a domain's choices that fall on other experts than those of the other domains, and 'by
    chance' the same between the two halves of its own text: where both are alike, no expert has a field of its own.
    """
    from dsv3.cli.evaluate import run_to_read, text_of
    from dsv3.data.prepared import load_prepared
    from dsv3.evals.acceptance import draft_acceptance
    from dsv3.evals.evaluation import held_out_text
    from dsv3.evals.specialisation import expert_loads, moe_layers
    from dsv3.infer.loaded import load
    from dsv3.runtime.device import set_threads

    run = run_to_read(model, paths=data or [])
    if data is not None and len(data) < 2:
        raise ConfigError(f"only {data[0]} was given; give text of another domain too, with a further --data PATH")
    set_threads(threads)
    loaded = load(model, plain=True, device=device)
    config = loaded.config
    if answers and not loaded.runner.num_mtp_modules:
        raise ConfigError(f"--answers {answers}, but {model} has no MTP module to draft with; leave it out")
    if data:
        text = text_of(data, tokenizer=loaded.tokenizer, max_tokens=max_tokens)
    else:
        assert run is not None, "run_to_read refuses a model without text"
        text = held_out_text(load_prepared(run / "corpus"), max_tokens=max_tokens)
    length = min(window or loaded.trained_length, config.max_position_embeddings)
    loads = expert_loads(loaded.model, documents=text.documents, window=length)
    layers = moe_layers(loaded.model)
    count = (32 if loaded.runner.num_mtp_modules else 0) if answers is None else answers
    drafts: Sequence[Acceptance] = ()
    if count:
        drafts = draft_acceptance(loaded, documents=text.documents, answers=count, temperature=temperature)
    if picture is not None:
        from dsv3.report.specialisation import draw_loads

        most = config.n_routed_experts / config.num_experts_per_tok
        draw_loads(loads, layers=layers, most=most, file=picture, title=str(model))
    found = {
        "window": length,
        "layers": list(layers),
        "domains": [domain.as_dict() for domain in loads],
        "temperature": temperature,
        "drafts": [domain.as_dict() for domain in drafts],
    }
    typer.echo(json.dumps(found, ensure_ascii=False) if as_json else table(loads, drafts=drafts))


def table(loads: "Sequence[DomainLoad]", *, drafts: "Sequence[Acceptance]") -> str:
    """Return a row a domain, with the means over layers."""
    lines = [["domain", "tokens", "MaxVio", "apart", "by chance", *(["drafts right"] if drafts else [])]]
    for place, load in enumerate(loads):
        row = [load.name, f"{load.tokens:,}", f"{fmean(load.max_violation):.3f}"]
        row += [f"{fmean(load.apart):.1%}", f"{fmean(load.by_chance):.1%}"]
        if drafts:
            row.append(f"{drafts[place].rate:.1%} ± {drafts[place].error:.1%}")
        lines.append(row)
    return "\n".join([*aligned(lines), f"\nlayers with experts: {len(loads[0].apart)}; means over them are shown"])
