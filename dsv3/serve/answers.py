"""One answer as it comes out of the engine: tokens to text, thoughts and tool calls apart, stop strings taken out."""

from dataclasses import dataclass, field

from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.events import FinishReason, TokenEvent, TokenLogprob
from dsv3.infer.stop import StopStrings
from dsv3.serve.reasoning import ReasoningSplitter
from dsv3.serve.tool_calls import ToolCallDelta, ToolCallParser

FINISH = {
    FinishReason.END_OF_TEXT: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.MAX_TOKENS: "length",
    FinishReason.CONTEXT_LIMIT: "length",
}


@dataclass(kw_only=True)
class Usage:
    """Tokens of one choice, or of several."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    accepted: int = 0
    rejected: int = 0

    def as_dict(self) -> dict[str, object]:
        """Return it as the OpenAI API and DeepSeek's have it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning,
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.rejected,
            },
            "prompt_cache_hit_tokens": self.cached,
            "prompt_cache_miss_tokens": self.prompt - self.cached,
        }


def usage_of(choices: "list[Choice]") -> Usage:
    """Return the usage of several answers; a prompt that has several counts once."""
    prompts = {choice.prompt_index: choice for choice in reversed(choices)}
    each = [choice.usage for choice in choices]
    return Usage(
        prompt=sum(choice.usage.prompt for choice in prompts.values()),
        cached=sum(choice.usage.cached for choice in prompts.values()),
        completion=sum(usage.completion for usage in each),
        reasoning=sum(usage.reasoning for usage in each),
        accepted=sum(usage.accepted for usage in each),
        rejected=sum(usage.rejected for usage in each),
    )


@dataclass(kw_only=True)
class Delta:
    """What one event added to an answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell a client."""
        return not (self.content or self.reasoning or self.calls or self.logprobs or self.finish_reason)


class Choice:
    """One answer under way."""

    def __init__(
        self,
        *,
        index: int,
        prompt_index: int,
        request_id: str,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        splits_reasoning: bool,
        thinks: bool,
        reads_tools: bool,
    ) -> None:
        self.index = index
        self.prompt_index = prompt_index
        self.request_id = request_id
        self.usage = Usage()
        self.finish_reason: str | None = None
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        self._decoder = tokenizer.stream_decoder()
        self._stop = StopStrings(stop)
        self._reasoning = ReasoningSplitter(starts_inside=thinks) if splits_reasoning else None
        self._calls = ToolCallParser() if reads_tools else None

    def take(self, event: TokenEvent) -> Delta:
        """Take what the engine brought; the answer may end here although the engine would go on."""
        self.usage.prompt = event.num_prompt_tokens
        self.usage.cached = event.num_cached_tokens
        self.usage.accepted += event.num_accepted
        self.usage.rejected += event.num_drafted - event.num_accepted
        if event.prompt_logprobs:
            self.prompt_logprobs = event.prompt_logprobs
        delta = Delta()
        shown = 0
        for token in event.tokens:
            shown += 1
            self.usage.completion += 1
            self._add(self._stop.add(self._decoder.add(token)), delta, tokens=1)
            if self._stop.found is not None:
                break
        delta.logprobs = event.logprobs[:shown]
        reason = FinishReason.STOP_STRING if self._stop.found is not None else event.finish_reason
        if reason is not None:
            self._finish(delta, reason=reason)
        return delta

    def _add(self, text: str, delta: Delta, *, tokens: int = 0) -> None:
        content = text
        if self._reasoning is not None:
            reasoning, content = self._reasoning.add(text)
            delta.reasoning += reasoning
            self.usage.reasoning += tokens if reasoning and not content else 0
        self._add_content(content, delta)

    def _add_content(self, content: str, delta: Delta) -> None:
        if self._calls is None:
            delta.content += content
            return
        for piece in self._calls.add(content) if content else []:
            if isinstance(piece, str):
                delta.content += piece
            else:
                delta.calls.append(piece)

    def _finish(self, delta: Delta, *, reason: FinishReason) -> None:
        if self._stop.found is None:
            self._add(self._stop.add(self._decoder.finish()) + self._stop.finish(), delta)
        if self._reasoning is not None:
            reasoning, content = self._reasoning.finish()
            delta.reasoning += reasoning
            self._add_content(content, delta)
        if self._calls is not None:
            for piece in self._calls.finish():
                if isinstance(piece, str):
                    delta.content += piece
                else:
                    delta.calls.append(piece)
        self.finish_reason = FINISH.get(reason, "stop")
        if self._calls is not None and self._calls.num_calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        delta.finish_reason = self.finish_reason
