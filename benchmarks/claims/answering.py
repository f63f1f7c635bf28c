"""The worker's side: orders from stdin, answers to stdout, a line of JSON each."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def answer_orders(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer each order of stdin until there are no more. What anybody else prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
