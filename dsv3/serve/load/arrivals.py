"""When requests arrive that do not wait for one another."""

import random
from collections.abc import Iterator


def poisson_arrivals(rate: float, *, seed: int) -> Iterator[float]:
    """Yield rising times in seconds, `rate` a second on average, for ever; the same seed gives the same times.

    The gaps are independent and exponential, which is how many users arrive who know nothing of each other: now and
    then several at once, and now and then nobody.
    """
    rng = random.Random(seed)
    time = 0.0
    while True:
        time += rng.expovariate(rate)
        yield time
