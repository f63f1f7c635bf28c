import re
from random import Random

from dsv3.data.chat_data import read_conversations
from dsv3.reproduce.distillation import DIVISOR, STEPS, chain, write


def solved(question):
    """Return a chain's value, read from left to right."""
    first, *steps = question.split(", ")
    value = int(first)
    for step in steps:
        value = value + int(step[1:]) if step[0] == "+" else value * int(step[1:])
    return value % DIVISOR


def test_chains_have_the_answer_that_their_steps_lead_to():
    chance, asked = Random(0), set()
    problems = [chain(chance, asked=asked) for _ in range(200)]
    for problem in problems:
        assert int(problem.answer) == solved(problem.name)
        worked = problem.more["worked"]
        assert worked.endswith(f"</think>{problem.answer}")
        assert len(re.findall(r"[+*]\d=\d", worked)) == STEPS
    assert len(asked) == len({problem.name for problem in problems}) == 200


def test_plain_and_worked_answers_are_written_for_the_same_questions(tmp_path):
    problems = [chain(Random(0), asked=set())]
    plain, worked = (write(problems, key=key, path=tmp_path / f"{key}.jsonl") for key in ("answer", "worked"))
    (short,), (long,) = (list(read_conversations([path])) for path in (plain, worked))
    assert short.messages[0] == long.messages[0]
    assert short.messages[1]["content"] == problems[0].answer
    assert "<think>" in long.messages[1]["content"]
