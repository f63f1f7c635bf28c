"""Our models in EleutherAI's lm-evaluation-harness, as its model `dsv3`.

The harness finds no models outside itself, so this module registers ours and then is its command line:

    python -m dsv3.evals.lm_eval_adapter --model dsv3 --model_args pretrained=RUN --tasks hellaswag
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv3.errors import ConfigError, MissingExtraError

try:
    import lm_eval.models  # noqa: F401  # The harness lists its own models only where there is none yet.
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise MissingExtraError(package="lm-eval", extra="eval", purpose="a model inside lm-evaluation-harness") from error

from dsv3.data.chat_template import render_chat
from dsv3.evals.scoring import TEXTS_AT_ONCE, EngineAnswerer
from dsv3.infer.loaded import load

MAX_TOKENS = 256
"""Of an answer, where the task names none; as the harness's own models have it."""
_NAMES_OF_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("dsv3")
class Dsv3LM(LM):  # type: ignore[misc]  # lm-eval brings no types
    """A run, an export or a published checkpoint. `pretrained` is its folder, the rest is as in `dsv3.load`."""

    def __init__(
        self,
        pretrained: str,
        *,
        weights: str = "auto",
        device: str | None = None,
        average: bool = False,
        max_length: int | None = None,
        cache_tokens: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        del batch_size, max_batch_size  # The harness always gives them; the engine fills its passes by itself.
        model = load(pretrained, weights=weights, device=device or "auto", average=average, cache_tokens=cache_tokens)
        self.model = model
        self.answerer = EngineAnswerer(model, context=max_length)

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells prepared requests apart by."""
        return str(Path(self.model.source).resolve()).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template that conversations are written in."""
        if isinstance(chat_template, str):
            raise ConfigError(f"chat template {chat_template!r}: the tokenizer has one template, without a name")
        return self.model.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, up to where the answer begins or goes on."""
        return render_chat(self.model.tokenizer, messages=chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is the greedy one."""

        def score(some: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
            return [(one.logprob, one.is_greedy) for one in self.answerer.continuations(some)]

        return self._in_blocks("loglikelihood", requests, score)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Return the log-probability of each text."""
        return self._in_blocks(
            "loglikelihood_rolling", requests, lambda some: self.answerer.rolling([text for (text,) in some])
        )

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return the greedy answer to each prompt.

        Raises:
            ConfigError: a task asks for sampling.
        """

        def answer(some: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
            asked = [generation_settings(settings) for _, settings in some]
            return self.answerer.generate(
                [prompt for prompt, _ in some],
                stops=[stops for stops, _ in asked],
                max_tokens=[most for _, most in asked],
            )

        return self._in_blocks("generate_until", requests, answer)

    def _in_blocks(self, kind: str, requests: list[Any], answer: Callable[[Any], list[Any]]) -> list[Any]:
        """Answer many requests at a time, and let the harness's cache have what was answered before a break."""
        answers: list[Any] = []
        for begin in range(0, len(requests), TEXTS_AT_ONCE):
            some = [request.args for request in requests[begin : begin + TEXTS_AT_ONCE]]
            found = answer(some)
            for args, one in zip(some, found, strict=True):
                self.cache_hook.add_partial(kind, args, one)
            answers += found
        return answers


def generation_settings(settings: dict[str, Any]) -> tuple[list[str], int]:
    """Return stop strings and the most tokens of an answer, as a task of the harness names them.

    Raises:
        ConfigError: it asks for anything but the greedy answer.
    """
    known = {"until", "do_sample", "temperature", "top_p", "top_k", *_NAMES_OF_MAX_TOKENS}
    if unknown := sorted(set(settings) - known):
        raise ConfigError(f"the task asks for {', '.join(unknown)}, which answers here do not have")
    if settings.get("do_sample") and settings.get("temperature") != 0:
        raise ConfigError(
            "the task asks for sampled answers, and those here are greedy; give --gen_kwargs do_sample=False"
        )
    until = settings.get("until") or []
    stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
    most = next((settings[name] for name in _NAMES_OF_MAX_TOKENS if settings.get(name)), MAX_TOKENS)
    return stops, int(most)


def main() -> None:
    """Be the harness's command line, with our model known to it."""
    from lm_eval.__main__ import cli_evaluate  # as slow to import as it is

    cli_evaluate()


if __name__ == "__main__":
    main()
