from rich.console import Console

from dsv3.serve.load.measure import Outcome, summarise
from dsv3.serve.load.table import plain, render


def shown(outcomes) -> str:
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(render(summarise(outcomes)))
    return capture.get()


def test_the_table_shows_latencies_in_milliseconds_and_the_rest_in_sentences():
    whole = Outcome(
        scheduled=0.0, first=0.25, last=1.25, end=2.0, prompt_tokens=100, cached_tokens=50, completion_tokens=101
    )
    whole.accepted_drafts, whole.rejected_drafts, whole.is_counted = 30, 10, True
    text = shown([whole, Outcome(scheduled=0.0, end=1.0, error="http 429")])
    rows = {line[:25].strip(): line[25:].split() for line in text.splitlines() if line[:25].strip()}
    assert rows["time to first token"] == ["250"] * 4
    assert rows["time per token after it"] == ["10"] * 4
    assert rows["whole answer"] == ["2,000"] * 4
    assert rows["between pieces of text"] == ["–"] * 4
    assert "1 of 2 requests answered in 2.0 s: 0.5 requests/s, 50.5 tokens/s (100 with prompts)" in text
    assert "prompts of 100 tokens, 50 % of them cached; answers of 101 tokens" in text
    assert "75 % of the tokens drafted by MTP were accepted" in text
    assert "errors: 1 http 429" in text


def test_what_was_not_measured_is_a_dash_and_not_a_number():
    text = shown([])
    assert "nan" not in text
    assert "MTP" not in text
    assert "0 of 0 requests" in text


def test_numbers_have_three_digits_or_more():
    assert [plain(value) for value in (0.12345, 12.345, 99.96, 123.45, 12345.6)] == [
        "0.123",
        "12.3",
        "100",
        "123",
        "12,346",
    ]
