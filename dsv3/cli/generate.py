"""dsv3 generate: continue a text."""

import json
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dsv3.infer.text import TextStream

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run folder, an export folder, or a published checkpoint's folder.")
]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token; higher is more varied.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that together reach this probability.")]
TopK = Annotated[int, typer.Option(help="Draw from this many of the likeliest tokens; 0 for all.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text; fresh when left out.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text to stop at, not shown; may be given several times, a newline as $'\\n'.")
]
Weights = Annotated[
    str, typer.Option(metavar="FORMAT", help="How weights are kept: auto (as stored), fp32, bf16, fp8, int8 or int4.")
]
Average = Annotated[bool, typer.Option("--average", help="Take the moving average of the weights that a run keeps.")]
Drafts = Annotated[
    int, typer.Option(min=0, help="Tokens that the MTP modules draft ahead at most, where it pays; 0 for none.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 takes all that this process may use.")]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("generate")(generate)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object when done, instead of text as it comes.")
    ] = False,
    weights: Weights = "auto",
    average: Average = False,
    drafts: Drafts = 0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Continue a text. The continuation goes to standard output as it is made; speed and seed to standard error."""
    from dsv3.infer.loaded import load, sampling_params
    from dsv3.runtime.device import set_threads

    seed = secrets.randbelow(2**32) if seed is None else seed
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or (),
    }
    sampling_params(**settings)  # A wrong option is refused before minutes go into loading.
    set_threads(threads)
    loaded = load(model, weights=weights, device=device, average=average, drafts=drafts)
    text = sys.stdin.read() if prompt == "-" else prompt
    stream = loaded.stream(text, **settings)
    if as_json:
        answer = "".join(stream)
        print(json.dumps({"prompt": text, "text": answer, "seed": seed, **measured(stream)}, ensure_ascii=False))
        return
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    print(speed_line(stream, seed=seed), file=sys.stderr)


def measured(stream: "TextStream") -> dict[str, Any]:
    """Return what a finished stream has to say about itself."""
    return {
        "finish_reason": str(stream.finish_reason),
        "prompt_tokens": stream.prompt_tokens,
        "completion_tokens": stream.completion_tokens,
        "prompt_seconds": round(stream.prompt_seconds, 4),
        "tokens_per_second": round(stream.tokens_per_second, 2),
        "drafted_tokens": stream.drafts[0],
        "accepted_tokens": stream.drafts[1],
    }


def speed_line(stream: "TextStream", *, seed: int) -> str:
    """Say how fast a text was made, why it ended, and what repeats it."""
    found = measured(stream)
    drafts = ""
    if found["drafted_tokens"]:
        drafts = f"; {found['accepted_tokens']} of {found['drafted_tokens']} drafts right"
    return (
        f"[prompt: {found['prompt_tokens']} tokens in {found['prompt_seconds']:.2f} s; "
        f"answer: {found['completion_tokens']} tokens at {found['tokens_per_second']:.1f} tokens/s; "
        f"ended by {found['finish_reason']}{drafts}; seed {seed}]"
    )
