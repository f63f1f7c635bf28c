"""dsv3 eval run and compare: the report's benchmarks, and what two models differ by."""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv3.cli.columns import aligned
from dsv3.cli.generate import Weights
from dsv3.errors import ConfigError

if TYPE_CHECKING:
    from dsv3.evals.answerer import Answerer, Continuation
    from dsv3.evals.question import EvalTask
    from dsv3.evals.results import Difference
    from dsv3.evals.running import TaskRun

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def run(
    data: Annotated[Path, typer.Option(metavar="DIR", help="The folder in which the folders of the tasks' data lie.")],
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL]", help="A run folder, an export folder, or a published checkpoint's folder."),
    ] = None,
    suite: Annotated[str, typer.Option(help="base (report Table 3), chat (Table 6), or quick.")] = "quick",
    tasks: Annotated[str, typer.Option(metavar="NAME,NAME", help="Of the tasks, these.")] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of each task, the first items; all when left out, and 50 of 'quick'.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="No answer is longer; as each task says when left out, 8,192 at most.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where outcomes go; the folder evaluation/ of a run when left out."),
    ] = None,
    endpoint: Annotated[str, typer.Option(metavar="URL", help="Ask a server, as http://HOST:PORT/v1.")] = "",
    endpoint_model: Annotated[str, typer.Option(metavar="NAME", help="What the server calls the model.")] = "",
    key_variable: Annotated[
        str, typer.Option(metavar="NAME", help="The environment variable that holds the server's key.")
    ] = "",
    concurrency: Annotated[int, typer.Option(min=1, help="Questions that a server is asked at once.")] = 8,
    as_json: AsJson = False,
    weights: Weights = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes all that this process may use.")] = 0,
) -> None:
    """Put the report's benchmarks to a model, and show its scores beside those published.

    A run that is stopped goes on with the same command, and asks nothing twice. Rows that cannot be measured here are
    listed with what they need.
    """
    from dsv3.evals.benchmarks import run_benchmarks
    from dsv3.evals.results import shown, table_beside_published, task_result, what_is_missing
    from dsv3.evals.suite import chosen_tasks, suite_named
    from dsv3.evals.tasks import TASKS

    if (model is None) == (not endpoint):
        raise ConfigError("give a MODEL, or --endpoint URL with --endpoint-model NAME, and not both")
    if bool(endpoint) != bool(endpoint_model) or (key_variable and not endpoint):
        raise ConfigError("--endpoint, --endpoint-model and --key-variable go together; a server may have many models")
    if not data.is_dir():
        raise ConfigError(f"{data} is no folder; --data takes the one in which the folders of the tasks' data lie")
    chosen = suite_named(suite)
    asked = chosen_tasks(chosen, names=tuple(filter(None, map(str.strip, tasks.split(",")))), known=TASKS)

    def told(done: "TaskRun") -> None:
        result = task_result(done)
        score = shown(result["score"], metric=result["metric"], error=result["standard_error"])
        kept = f", {done.num_kept:,} of an earlier sitting" if done.num_kept else ""
        typer.echo(f"{result['task']}: {result['metric']} {score} ({result['count']:,} items{kept})", err=True)

    asking = (
        _of_endpoint(endpoint, name=endpoint_model, key_variable=key_variable, concurrency=concurrency)
        if model is None
        else _of_folder(model, weights=weights, device=device, threads=threads)
    )
    with asking as subject:
        results = run_benchmarks(
            asked,
            suite=chosen,
            answerer_for=subject.answerer_for,
            model=subject.identity,
            data=data,
            folder=output or subject.folder,
            limit=limit or chosen.limit,
            max_tokens=max_tokens,
            told=told,
        )
    if as_json:
        typer.echo(json.dumps(results, ensure_ascii=False))
        return
    typer.echo("\n".join(aligned(table_beside_published(results))))
    if missing := what_is_missing(results):
        typer.echo("\n" + "\n".join(missing))
    typer.echo(f"\nOutcomes and first prompts: {output or subject.folder}")


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A folder that dsv3 eval run has written to.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Compare two models by the items that both have answered."""
    from dsv3.evals.results import compare as compare_folders

    found = compare_folders(first, second)
    if as_json:
        typer.echo(json.dumps([asdict(difference) | {"is_seen": difference.is_seen} for difference in found]))
        return
    typer.echo(_differences(found))


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model that is asked."""

    answerer_for: "Callable[[EvalTask], Answerer]"
    identity: Mapping[str, Any]
    folder: Path
    """Where its outcomes go if nothing else is said."""


@contextmanager
def _of_endpoint(address: str, *, name: str, key_variable: str, concurrency: int) -> Iterator[_Subject]:
    from dsv3.evals.endpoint import Endpoint
    from dsv3.evals.endpoint_answerer import EndpointAnswerer

    with closing(Endpoint(address, key_variable=key_variable)) as endpoint:
        plain, chat = (
            EndpointAnswerer(endpoint, model=name, chat=chat, concurrency=concurrency) for chat in (False, True)
        )
        yield _Subject(
            answerer_for=lambda task: chat if task.chat else plain,
            identity={"endpoint": address, "model": name},
            folder=Path("evaluation") / name.replace("/", "-"),
        )


@contextmanager
def _of_folder(model: Path, *, weights: str, device: str, threads: int) -> Iterator[_Subject]:
    from dsv3.infer.loaded import load
    from dsv3.infer.model_folder import find_model
    from dsv3.posttrain.teacher import weights_hash
    from dsv3.runtime.device import set_threads

    set_threads(threads)
    found = find_model(model)
    loaded = load(model, weights=weights, device=device)
    plain: Answerer = importlib.import_module("dsv3.evals.scoring").EngineAnswerer(loaded)
    chat = _InConversation(plain, render=lambda text: _as_message(loaded.tokenizer, text))
    yield _Subject(
        answerer_for=lambda task: chat if task.chat else plain,
        identity={"model": model.absolute().name, "weights": weights_hash(found), "format": weights},
        folder=found.run / "evaluation" if found.run else Path("evaluation") / model.absolute().name,
    )


def _as_message(tokenizer: Any, text: str) -> str:
    from dsv3.data.chat_template import render_chat

    return render_chat(tokenizer, messages=[{"role": "user", "content": text}], add_generation_prompt=True)


class _InConversation:
    """Asks each question as the first message of a conversation."""

    def __init__(self, answerer: "Answerer", *, render: Callable[[str], str]) -> None:
        self._answerer, self._render = answerer, render

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> "list[Continuation]":
        return self._answerer.continuations([(self._render(context), text) for context, text in pairs])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        return self._answerer.rolling(texts)

    def generate(
        self, prompts: Sequence[str], *, stops: Sequence[Sequence[str]], max_tokens: Sequence[int]
    ) -> list[str]:
        return self._answerer.generate([*map(self._render, prompts)], stops=stops, max_tokens=max_tokens)


def _differences(found: "Sequence[Difference]") -> str:
    """Return a row a task: both scores, what they differ by, and how many items each is better at."""
    from dsv3.evals.results import shown

    rows = [["task", "metric", "A", "B", "A - B", "items", "A better", "B better", ""]]
    for one in found:
        rows.append(
            [
                one.task,
                one.metric,
                shown(one.first, metric=one.metric),
                shown(one.second, metric=one.metric),
                shown(one.difference, metric=one.metric, error=one.standard_error),
                f"{one.count:,}",
                f"{one.first_better:,}",
                f"{one.second_better:,}",
                "differ" if one.is_seen else "no difference seen",
            ]
        )
    lines = aligned(rows)
    if unpaired := sum(one.unpaired for one in found):
        lines.append(f"\n{unpaired:,} items that one of them alone was asked, or in another form, are left out")
    return "\n".join(lines)
