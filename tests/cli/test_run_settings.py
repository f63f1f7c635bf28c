import logging

import pytest

from dsv3.cli.run_settings import run_settings


def warnings_of(*assignments: str) -> list[str]:
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    log, listener = logging.getLogger("dsv3.cli.run_settings"), Listener()
    log.addHandler(listener)
    try:
        run_settings("tiny", more_data=None, run=None, data=None, config_file=None, assignments=list(assignments))
    finally:
        log.removeHandler(listener)
    return told


def test_a_run_that_ends_before_its_learning_rate_comes_down_is_mentioned():
    (told,) = warnings_of("total_tokens=400000")
    assert "total_tokens = 400,000 ends the run before the learning rate has come down" in told


@pytest.mark.parametrize(
    "assignments",
    [
        (),
        (
            "total_tokens=400000",
            "optim.learning_rate.constant_until_tokens=200000",
            "optim.learning_rate.cosine_until_tokens=300000",
            "optim.learning_rate.hold_until_tokens=350000",
        ),
    ],
)
def test_a_whole_schedule_is_not(assignments):
    assert warnings_of(*assignments) == []
