"""The tokens that are not text: their spelling, their order, and the chat format they spell (report 4.1).

The bars of these names are U+FF5C and the low lines U+2581, so that ordinary text does not spell one by accident.
`<|EOT|>` is the exception, as published.
"""

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
THINK_BEGIN = "<think>"
THINK_END = "</think>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
END_OF_TURN = "<|EOT|>"

FIRST_TOKENS = (BOS, EOS, PAD)
"""Ids 0, 1 and 2 of every vocabulary."""

LAST_TOKENS = (
    THINK_BEGIN,
    THINK_END,
    FIM_HOLE,
    FIM_BEGIN,
    FIM_END,
    USER,
    ASSISTANT,
    END_OF_TURN,
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
"""The last ids of a vocabulary, in the published order: 128798 to 128814 with R1's names for the first two."""

HIDDEN_TOKENS = frozenset({*FIRST_TOKENS, END_OF_TURN})
"""Dropped by `decode(skip_special=True)`. In the published files the others of `LAST_TOKENS` are not marked special."""

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ("system", "user", "assistant") or message.content is not string %}
        {{- raise_exception("a message needs a text, and the role system, user or assistant; found " ~ message.role) }}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{{- messages | selectattr("role", "equalto", "system") | map(attribute="content") | join("\\n\\n") }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- "USER" + message.content }}
    {%- elif message.role == "assistant" %}
        {{- "ASSISTANT" + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "ASSISTANT" }}
{%- endif %}
""".replace("USER", USER).replace("ASSISTANT", ASSISTANT)
"""BOS, all system texts joined by a blank line, then turns without anything between them; an answer ends with EOS.

The published format of V3 for conversations without tools (fact sheet 1.8). Tool calls are refused, not dropped."""
