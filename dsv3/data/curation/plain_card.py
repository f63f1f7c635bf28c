"""The data card of `dsv3 prepare`: what became of every document, in the form of that of `dsv3 data prepare`."""

from collections import Counter
from typing import Any

from dsv3.config.curation import ReadingConfig
from dsv3.data.curation.account import StepAccount, add_up
from dsv3.data.curation.duplicates import EXACT, NEAR
from dsv3.data.curation.finish import CARD
from dsv3.data.prepared import PreparedCorpus, PreparedSource
from dsv3.runtime.atomic import write_json

MADE_BY = "dsv3 prepare"
Account = tuple[list[StepAccount], dict[str, dict[str, int]]]
"""Of one source: its steps, and bytes by language and domain, and documents by length."""


def write_plain_card(corpus: PreparedCorpus, *, accounts: list[Account], not_applied: list[str]) -> None:
    """Write the card of a corpus whose sources have these accounts. It holds no times."""
    steps = add_up((steps for steps, _ in accounts), keep=ReadingConfig().max_remarks)
    told: dict[str, Counter[str]] = {"languages": Counter(), "domains": Counter(), "lengths": Counter()}
    for _, more in accounts:
        for name, counts in told.items():
            counts.update(more[name])
    pairs = zip(corpus.sources, accounts, strict=True)
    copies = next(step for step in steps if step.name == "copies").dropped
    card = {
        "made_by": MADE_BY,
        "not_applied": not_applied,
        "settings": {**corpus.settings, "recipe": "", "inputs": [_input(source) for source in corpus.sources]},
        "files": 0,
        "file_bytes": 0,
        "not_listed": [],
        "steps": [{key: value for key, value in vars(step).items() if key != "seconds"} for step in steps],
        "before_copies": {name: dict(counts.most_common()) for name, counts in told.items()},
        "copies": {"sizes": [], "largest": [], **{name: copies.get(name, [0, 0])[0] for name in (EXACT, NEAR)}},
        "groups": {_group_name(source, more): _group(source) for source, (_, more) in pairs},
    }
    write_json(card, path=corpus.folder / CARD)


def _input(source: PreparedSource) -> dict[str, Any]:
    return {"name": source.name, "path": source.path, "kind": "auto", "provenance": ""}


def _group_name(source: PreparedSource, told: dict[str, dict[str, int]]) -> str:
    """Return the source with the domain that most of its bytes are of."""
    domains = told["domains"]
    return f"{source.name}/{max(domains, key=lambda name: domains[name]) if domains else 'other-languages'}"


def _group(source: PreparedSource) -> dict[str, Any]:
    names = ("documents", "bytes", "tokens", "fim_documents", "held_out_documents", "held_out_bytes")
    return {name: getattr(source, name) for name in names} | {"provenance": ""}
