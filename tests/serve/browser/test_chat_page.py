"""The chat page in a real browser, against a server that plays what each test writes for it."""

import json

import pytest

USAGE = {
    "prompt_tokens": 40,
    "completion_tokens": 20,
    "total_tokens": 60,
    "prompt_tokens_details": {"cached_tokens": 32},
    "completion_tokens_details": {"accepted_prediction_tokens": 9, "rejected_prediction_tokens": 3},
}
DONE = "!document.querySelector('#send').hidden && document.querySelector('.answer .figures')"


@pytest.fixture
def say(server, scripted):
    """Let the server answer with these pieces of text, and whatever else a script can hold."""

    def set_script(*pieces: str, **script) -> None:
        if pieces:
            script["deltas"] = [{"content": piece} for piece in pieces]
        server.scripts.append(scripted.Script(**script))

    return set_script


def ask(page, text: str, *, until: str = DONE) -> None:
    page.evaluate("document.querySelector('#message').focus()")
    page.type(text)
    page.press("Enter")
    page.wait_for("document.querySelector('#message').value === ''")
    page.wait_for(until)


def set_field(page, name: str, value: str) -> None:
    page.evaluate(
        f"(() => {{ const field = document.querySelector('#{name}'); field.value = {json.dumps(value)};"
        "field.dispatchEvent(new Event('change', {bubbles: true})) })()"
    )


def contrast(page, selector: str) -> float:
    """Ratio of luminances of an element's text and what it stands on, as WCAG 2 defines it."""
    colours = page.evaluate(
        f"(() => {{ let found = document.querySelector({json.dumps(selector)});"
        "const ink = getComputedStyle(found).color; let paper = 'rgba(0, 0, 0, 0)';"
        "for (; found && paper === 'rgba(0, 0, 0, 0)'; found = found.parentElement)"
        "  paper = getComputedStyle(found).backgroundColor; return [ink, paper] })()"
    )
    lights = sorted(luminance([int(part) for part in colour[4:-1].split(",")]) for colour in colours)
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(rgb: list[int]) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_an_answer_appears_while_it_comes_with_its_figures(page, server, say):
    server.models = ["tiny"]
    say("one ", "two ", "three", seconds_between=0.1, usage={**USAGE, "completion_tokens": 3})
    ask(page, "Count.", until="document.querySelector('.prose').innerText.startsWith('one')")
    assert page.is_shown("#stop")
    assert page.evaluate("document.querySelector('#turns').ariaBusy") == "true"
    page.wait_for(DONE)
    assert page.text(".prose") == "one two three"
    assert page.evaluate("document.querySelector('#turns').ariaBusy") == "false"
    figures = {name: page.text(f"[data-figure={name}]") for name in ("speed", "tokens", "drafts", "prompt")}
    speed = float(figures.pop("speed").split()[0])
    assert 6 < speed < 13  # Two tokens after the first one in about 0.2 s; three would be 15 a second.
    assert figures == {
        "tokens": "3 tokens",
        "drafts": "75 % of drafts accepted",
        "prompt": "prompt 40, 32 from cache",
    }
    assert server.received[0]["messages"] == [{"role": "user", "content": "Count."}]
    assert server.received[0]["stream_options"]["include_usage"] is True
    assert server.received[0]["model"] == "tiny"


def test_usage_within_chunks_is_shown_before_the_answer_is_whole(page, say):
    so_far = {**USAGE, "completion_tokens": 7}
    say("one ", "two ", is_endless=True, chunk_usage=[so_far])
    ask(page, "Count.", until="document.querySelector('[data-figure=tokens]')")
    assert page.text("[data-figure=tokens]") == "7 tokens"
    assert page.text("[data-figure=drafts]") == "75 % of drafts accepted"
    page.press("Escape")
    page.wait_for(DONE)


def test_tokens_are_marked_as_a_guess_where_the_server_does_not_count_them(page, say):
    say("one ", "two ")
    ask(page, "Count.")
    assert page.text("[data-figure=tokens]") == "≈ 2 tokens"
    assert not page.is_shown("[data-figure=drafts]")


def test_an_answer_that_comes_all_at_once_is_given_no_speed(page, say):
    say(*["word "] * 17, usage={**USAGE, "completion_tokens": 17})
    ask(page, "Count.")
    assert page.text("[data-figure=tokens]") == "17 tokens"
    assert not page.is_shown("[data-figure=speed]")


@pytest.mark.parametrize("way", ["click", "Escape"])
def test_stopping_hangs_up_on_the_server_and_keeps_what_was_said(page, server, say, way):
    say("word ", is_endless=True)
    ask(page, "Talk.", until="document.querySelector('.prose').innerText.length > 10")
    assert not server.hung_up.is_set()
    page.click("#stop") if way == "click" else page.press("Escape")
    assert server.hung_up.wait(timeout=5)
    page.wait_for(DONE)
    assert page.text(".prose").startswith("word word")
    assert page.text("[data-figure=ended]") == "stopped"
    server.scripts.clear()
    ask(
        page,
        "Go on.",
        until="document.querySelectorAll('.answer').length === 2 && !document.querySelector('#send').hidden",
    )
    assert [message["role"] for message in server.received[1]["messages"]] == ["user", "assistant", "user"]


def test_thinking_is_folded_and_stays_out_of_what_is_sent_back(page, server, say):
    thoughts = [{"reasoning_content": "Let me ", "reasoning": "Let me "}, {"reasoning": "think."}]
    say(deltas=[*thoughts, {"content": "Four."}])
    ask(page, "2 + 2?")
    assert page.text("summary").startswith("Thought for")
    assert not page.is_shown(".reasoning")
    page.click("summary")
    assert page.text(".reasoning") == "Let me think."
    assert page.text(".prose") == "Four."
    ask(page, "Sure?", until="document.querySelectorAll('.answer').length === 2")
    assert server.received[1]["messages"][1] == {"role": "assistant", "content": "Four."}


def test_a_code_block_is_shown_as_written_and_copied_whole(page, server, say):
    code = "def f(a, b):\n\n    return a * b * `c`  # **not** bold"
    page.grant_clipboard(server.url)
    say("Look:\n\n```py", f"thon\n{code}\n", "```\n\nThat is it.")
    ask(page, "Code, please.")
    assert page.evaluate("document.querySelector('pre code').textContent") == code
    assert page.text(".code span") == "python"
    assert (
        page.evaluate("[...document.querySelector('.prose').children].map((block) => block.tagName).join()")
        == "P,DIV,P"
    )
    page.click(".code button")
    page.wait_for("document.querySelector('.code button').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == code


def test_code_is_copied_where_the_browser_keeps_its_clipboard_for_secure_pages(page, say):
    page.evaluate(
        "(() => { Object.defineProperty(navigator, 'clipboard', {value: undefined});"
        "document.addEventListener('copy', () => { window.copied = document.activeElement.value }) })()"
    )
    say("```\nx = 1\n```")
    ask(page, "Code, please.")
    page.click(".code button")
    page.wait_for("document.querySelector('.code button').textContent === 'Copied'")
    assert page.evaluate("window.copied") == "x = 1"


MARKDOWN = {
    "a **b** and *c*, `d*e*`": "<p>a <strong>b</strong> and <em>c</em>, <code>d*e*</code></p>",
    "# One\n## Two\n##### Five": "<h2>One</h2><h3>Two</h3><h4>Five</h4>",
    "- a\n- b\n  - c": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>",
    "3. a\n   - b\n4. c": '<ol start="3"><li>a<ul><li>b</li></ul></li><li>c</li></ol>',
    "snake_case_name, 2 * 3 * 4, **open": "<p>snake_case_name, 2 * 3 * 4, **open</p>",
    r"\*not\* ***both***": "<p>*not* <em><strong>both</strong></em></p>",
    "a\n***\nb": "<p>a\n***\nb</p>",
    "> said\n> twice": "<blockquote><p>said\ntwice</p></blockquote>",
    "a  \nb\n\n---": "<p>a<br>b</p><hr>",
}


def test_markdown_becomes_these_elements(page, say):
    for text in MARKDOWN:
        say(text)
    for number, _ in enumerate(MARKDOWN, start=1):
        ask(page, "?", until=f"document.querySelectorAll('.answer').length === {number} && {DONE}")
    elements = "[...document.querySelectorAll('.prose')].map((prose) => prose.innerHTML.replaceAll('\\n<', '<'))"
    assert dict(zip(MARKDOWN, page.evaluate(elements), strict=True)) == MARKDOWN


def test_depth_and_length_of_what_a_model_writes_have_bounds(page, say):
    say("- " * 3000, "\n\n" + "> " * 3000, "\n\n" + "**a " * 3000, "\n\n" + "[" * 3000)
    ask(page, "Nest.")
    assert page.evaluate("document.querySelectorAll('.prose *').length") < 200
    assert page.evaluate("document.querySelector('.prose').textContent.length") > 3 * 3000


EVIL = """<img src=x onerror="window.broken = 1"><script>window.broken = 2</script>

# <svg onload=window.broken=3>

[click](javascript:window.broken=4) [data](data:text/html,<script>window.broken=5</script>)
[case](JaVaScRiPt:window.broken=6) [tab](java&#09;script:window.broken=7) [file](file:///etc/passwd)
![picture](https://example.invalid/leak.png) [good](https://example.invalid/a_(b)) https://example.invalid/x.

```<script>window.broken=8</script>
</code></pre><script>window.broken = 9</script>
```
"""


def test_markup_scripts_and_unsafe_links_of_an_answer_are_inert(page, server, say):
    say(
        deltas=[
            {"reasoning_content": EVIL},
            *({"content": EVIL[start : start + 7]} for start in range(0, len(EVIL), 7)),
        ],
        usage={**USAGE, "completion_tokens": "<img src=x onerror=window.broken=10>"},
    )
    ask(page, EVIL.replace("\n", " "))
    page.click("summary")
    inside = "[...document.querySelectorAll('#turns *')]"
    assert (
        page.evaluate(f"{inside}.filter((found) => found.matches('script, img, iframe, object, .prose svg')).length")
        == 0
    )
    assert (
        page.evaluate(f"{inside}.flatMap((found) => found.getAttributeNames()).filter((name) => /^on/.test(name))")
        == []
    )
    links = page.evaluate("[...document.querySelectorAll('#turns a')].map((link) => link.href)")
    safe = ["https://example.invalid/leak.png", "https://example.invalid/a_(b)", "https://example.invalid/x"]
    assert links == safe
    assert "<script>window.broken = 9</script>" in page.text("pre")
    assert "onerror" in page.text(".question .text")
    for place in range(page.evaluate("document.querySelectorAll('.prose span, .prose a').length")):
        page.evaluate(
            f"(() => {{ const found = document.querySelectorAll('.prose span, .prose a')[{place}];"
            "found.removeAttribute('target'); if (found.protocol !== 'https:') found.click() })()"
        )
    page.evaluate("new Promise((resolve) => setTimeout(resolve, 50))")
    assert page.evaluate("window.broken") is None


def test_an_error_of_the_server_with_markup_in_it_is_shown_as_text(page, say):
    say(status=400, error={"message": "top_p = <img src=x onerror=window.broken=1>", "param": "top_p"})
    ask(page, "Hi")
    assert page.text(".error") == "The server answered 400: top_p = <img src=x onerror=window.broken=1>"
    assert page.evaluate("window.broken") is None


def test_a_server_that_asks_for_a_key_gets_it_and_the_question_is_answered(page, server, say):
    server.key = "secret-17"
    say("Welcome.")
    ask(page, "Let me in.", until="!document.querySelector('#key-form').hidden")
    assert page.evaluate("document.activeElement.id") == "key"
    page.type("wrong")
    page.press("Enter")
    page.wait_for("document.querySelector('#status').textContent === 'The server does not accept this key.'")
    page.type("secret-17")
    page.press("Enter")
    page.wait_for("document.querySelector('.prose')?.innerText === 'Welcome.'")
    page.wait_for(DONE)
    assert not page.is_shown("#key-form")
    assert page.evaluate("document.querySelectorAll('article').length") == 2
    kept = page.evaluate("JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie])")
    assert "Let me in." in kept
    assert "secret-17" not in kept
    assert page.evaluate("document.querySelector('#key').value") == ""


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            {"status": 429, "error": {"message": "the queue is full"}, "headers": {"Retry-After": "7"}},
            "The server answered 429: the queue is full. Try again in 7 s.",
        ),
        ({"error": {"message": "out of pages"}}, "The server gave up: out of pages"),
        ({"is_cut": True}, "The connection ended before the answer did."),
        ({"raw": "data: {oops\n\n"}, "The server sent something that is not JSON."),
    ],
)
def test_what_went_wrong_is_said_and_can_be_tried_again(page, server, say, script, message):
    say(**script)
    say("Better.")
    ask(page, "Hi")
    assert page.text(".error") == message
    page.click(".answer .actions button:last-child")
    page.wait_for("document.querySelector('.prose')?.innerText === 'Better.'")
    page.wait_for(DONE)
    assert not page.is_shown(".error")
    assert server.received[1]["messages"] == [{"role": "user", "content": "Hi"}]


def test_a_server_that_is_gone_is_said_to_be_gone(page):
    page.evaluate("window.fetch = async () => { throw new TypeError('Failed to fetch') }")
    ask(page, "Hi")
    assert page.text(".error") == "The server cannot be reached. Is it still running?"


def test_a_stream_in_odd_pieces_and_line_ends_is_read_like_any_other(page, say):
    event = json.dumps({"choices": [{"delta": {"content": "ä 漢 "}, "finish_reason": None}]}, ensure_ascii=False)
    say(raw=f": comment\r\n\r\ndata:{event}\r\rdata: {event}\r\n\r\nevent: x\nid: 1\ndata: [DONE]\n\n")
    ask(page, "Hi")
    assert page.text(".prose") == "ä 漢 ä 漢"
    assert not page.is_shown(".error")


def test_settings_are_sent_as_they_stand_and_left_out_where_empty(page, server, say):
    say("Yes.")
    ask(page, "Hi")
    assert set(server.received[0]) == {"messages", "stream", "stream_options", "model"}
    wanted = {"temperature": 0, "top_p": 0.9, "top_k": 40, "max_tokens": 5, "seed": 7}
    for name, value in wanted.items():
        set_field(page, name, str(value))
    set_field(page, "system", "Be brief.")
    set_field(page, "thinking", "disabled")
    ask(page, "Again", until="document.querySelectorAll('.answer').length === 2")
    sent = server.received[1]
    assert {name: sent[name] for name in wanted} == wanted
    assert sent["thinking"] == {"type": "disabled"}
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_number_out_of_range_is_refused_beside_its_field(page, server):
    set_field(page, "top_p", "1.5")
    page.evaluate("document.querySelector('#message').focus()")
    page.type("Hi")
    page.press("Enter")
    page.wait_for("document.activeElement.id === 'top_p'")
    assert page.is_shown("#top_p")
    assert server.received == []
    assert page.evaluate("document.querySelector('#message').value") == "Hi"


def test_the_last_turn_can_be_made_again_and_edited(page, server, say):
    for text in ("First.", "Second.", "Third.", "Fourth."):
        say(text)
    ask(page, "One")
    ask(page, "Two", until=f"document.querySelectorAll('.answer').length === 2 && {DONE}")
    page.click("article:last-child .actions button:last-child")
    page.wait_for("document.querySelector('article:last-child .prose')?.innerText === 'Third.'")
    page.wait_for(DONE)
    assert server.received[2]["messages"] == server.received[1]["messages"]
    assert not page.is_shown("article:first-child .actions")
    page.click("article:nth-child(3) .actions button")
    page.wait_for("document.activeElement.ariaLabel === 'Edit your message'")
    page.type(" and a half")
    page.press("Enter")
    page.wait_for("document.querySelector('article:last-child .prose')?.innerText === 'Fourth.'")
    assert [message["content"] for message in server.received[3]["messages"]] == ["One", "First.", "Two and a half"]
    assert page.evaluate("document.querySelectorAll('article').length") == 4


def test_an_edit_that_is_cancelled_changes_nothing(page, server, say):
    say("First.")
    ask(page, "One")
    page.click(".question .actions button")
    page.wait_for("document.activeElement.ariaLabel === 'Edit your message'")
    page.type("!")
    page.press("Escape")
    assert page.text(".question .text") == "One"
    assert page.text(".prose") == "First."
    assert len(server.received) == 1


def test_a_reload_keeps_the_conversation_and_a_new_chat_forgets_it(page, server, say):
    say("Kept.", usage=USAGE)
    set_field(page, "seed", "5")
    ask(page, "Keep this")
    page.call("Page.reload")
    page.wait_for("document.querySelector('.prose')?.innerText === 'Kept.'")
    page.wait_for("document.querySelector('#model').options.length > 0")
    assert page.text("[data-figure=tokens]") == "20 tokens"
    assert page.evaluate("document.querySelector('#seed').value") == "5"
    page.click("#new-chat")
    assert page.evaluate("document.querySelectorAll('article').length") == 0
    assert page.is_shown("#welcome")
    page.call("Page.reload")
    page.wait_for("document.readyState === 'complete' && document.querySelector('#model').options.length > 0")
    assert page.evaluate("document.querySelectorAll('article').length") == 0


def test_everything_is_reached_and_done_with_the_keyboard_alone(page, server, say):
    say("First.")
    say("Second.")
    assert page.evaluate("document.activeElement.id") == "message"
    page.type("a")
    page.press("Enter", shift=True)
    page.type("b")
    assert server.received == []
    page.press("Enter")
    page.wait_for(DONE)
    assert server.received[0]["messages"][0]["content"] == "a\nb"
    reached = set()
    for _ in range(25):
        page.press("Tab")
        name, has_outline = page.evaluate(
            "((at) => [at.id || at.textContent, getComputedStyle(at).outlineStyle !== 'none'])(document.activeElement)"
        )
        reached.add(name)
        # The field that one writes in has a ring around the whole of it; past the last element Tab leaves the page.
        assert has_outline or name in ("message", page.evaluate("document.body.textContent")), name
        if name == "Regenerate" and page.text(".prose") == "First.":
            page.press("Enter")
            page.wait_for("document.querySelector('.prose')?.innerText === 'Second.'")
            page.wait_for(DONE)
    assert {"send", "new-chat", "open-settings", "Edit", "Copy", "Regenerate", "system", "temperature"} <= reached


def test_enter_that_chooses_a_character_does_not_send(page, server):
    page.type("ni")
    page.evaluate(
        "document.querySelector('#message').dispatchEvent(new KeyboardEvent('keydown',"
        "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert page.evaluate("document.querySelector('#message').value") == "ni"
    assert server.received == []


def test_nothing_is_wider_than_a_phone_of_360_pixels(page, say):
    page.resize(360, 700, is_phone=True)
    say("W" * 300 + "\n\n```\n" + "x" * 300 + "\n```\n- " + "https://example.invalid/" + "y" * 200, usage=USAGE)
    ask(page, "V" * 200)
    wide = "[document.documentElement.scrollWidth, document.querySelector('#reading').scrollWidth]"
    assert max(page.evaluate(wide)) <= 360
    assert page.evaluate("document.querySelector('pre').scrollWidth > document.querySelector('pre').clientWidth")
    page.click("#open-settings")
    page.wait_for("document.querySelector('#settings').getBoundingClientRect().width === 360")
    assert page.evaluate("document.querySelector('#settings').scrollWidth") <= 360
    page.press("Escape")
    assert not page.is_shown("#settings")
    assert page.evaluate("document.activeElement.id") == "open-settings"


def test_the_end_is_followed_unless_the_reader_has_scrolled_away(page, say):
    say("A line.\n\n", is_endless=True)
    reading = "document.querySelector('#reading')"
    ask(page, "Talk.", until=f"{reading}.scrollTop > 200")
    page.evaluate(f"{reading}.scrollTop = 0")
    grown = page.evaluate(f"{reading}.scrollHeight") + 300
    page.wait_for(f"{reading}.scrollHeight > {grown}")
    assert page.evaluate(f"{reading}.scrollTop") == 0
    page.press("Escape")
    page.wait_for(DONE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_can_be_read(page, say, scheme):
    page.prefer(scheme)
    say(
        deltas=[
            {"reasoning_content": "Hm."},
            {"content": "A [link](https://example.invalid) and `code`.\n\n```\nx\n```"},
        ]
    )
    say(status=500, error={"message": "broken"})
    ask(page, "Hi")
    ask(page, "Hi again", until="document.querySelector('.error:not([hidden])')")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance([int(part) for part in paper[4:-1].split(",")]) < 0.1) == (scheme == "dark")
    prose = ".prose p,.prose a,.prose code,.code pre,.code button"
    turns = "summary,.figures,.text,.error:not([hidden]),.actions button"
    around = "#model,#new-chat,#settings label,.hint,#send,#status,#message"
    for selector in f"{prose},{turns},{around}".split(","):
        assert contrast(page, selector) >= 4.5, selector


def test_every_control_has_a_name_that_can_be_read_aloud(page):
    unnamed = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "combobox", "spinbutton", "searchbox"}
    controls = [node for node in unnamed if node.get("role", {}).get("value") in roles]
    assert len(controls) >= 10
    assert [node for node in controls if not node.get("name", {}).get("value")] == []
