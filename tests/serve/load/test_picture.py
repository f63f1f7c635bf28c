import random

import pytest
from PIL import Image

from dsv3.errors import ConfigError
from dsv3.serve.load.measure import Outcome
from dsv3.serve.load.picture import save_picture


def some(count: int) -> list[Outcome]:
    rng = random.Random(0)
    found = []
    for number in range(count):
        first = number / 10 + rng.random()
        last = first + 1 + rng.random()
        error = "timeout" if number % 7 == 3 else ""
        found.append(Outcome(scheduled=number / 10, first=first, last=last, end=last, gaps=[0.1, 0.2], error=error))
        found[-1].completion_tokens = 20
    return found


@pytest.mark.parametrize("outcomes", [some(60), some(1), [], [Outcome(scheduled=0.0, end=1.0, error="timeout")]])
def test_a_picture_is_drawn_of_many_requests_of_one_of_none_and_of_a_failed_one(tmp_path, outcomes):
    save_picture(tmp_path / "load.png", outcomes=outcomes, title="a load")
    with Image.open(tmp_path / "load.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 700
        assert len(image.getcolors(maxcolors=10**6)) > 20


def test_a_picture_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        save_picture(tmp_path / "missing" / "load.png", outcomes=[], title="a load")
