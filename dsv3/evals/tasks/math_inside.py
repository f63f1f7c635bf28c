"""The process that compares mathematics: a line with two answers in, a line with the verdict out; without dsv3."""

import contextlib
import json
import logging
import sys

MEMORY = 2 << 30
"""Bytes of address space: 9^{9^{9^9}} would take more than any machine has."""


def main() -> None:
    """Compare until the other side closes."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Systems without such limits have the clock alone.
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()
    from math_verify import parse, verify

    for line in sys.stdin:
        try:
            # Its own time-outs are off: they are signals, which no long multiplication hears.
            wanted, found = (parse(f"${one}$", parsing_timeout=None) for one in json.loads(line))
            same = bool(verify(wanted, found, timeout_seconds=None))
        except Exception:
            same = False
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    main()
