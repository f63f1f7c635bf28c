import logging
from io import StringIO

from rich.console import Console

from dsv3.runtime.log import get_logger, log_through, say_once, show_log


def test_every_logger_lies_under_the_package():
    assert get_logger("dsv3.train.loop").name == "dsv3.train.loop"
    assert get_logger("elsewhere").name == "dsv3.elsewhere"
    assert get_logger("dsv3").name == "dsv3"


def test_a_message_is_said_once(caplog):
    with caplog.at_level(logging.INFO, logger="dsv3"):
        for _ in range(3):
            say_once("experts are computed one by one")
        say_once("another thing")
    assert [record.message for record in caplog.records] == ["experts are computed one by one", "another thing"]


def test_showing_the_log_twice_prints_each_line_once_and_on_the_error_stream(capfd):
    logger = logging.getLogger("dsv3")
    before = (logger.level, list(logger.handlers), logger.propagate)
    try:
        show_log(level=logging.WARNING)
        show_log(level=logging.WARNING)
        get_logger("dsv3.test").warning("once")
        get_logger("dsv3.test").info("not at all")
    finally:
        logger.level, logger.handlers, logger.propagate = before
    captured = capfd.readouterr()
    assert captured.err.split() == ["once"]
    assert captured.out == ""


def test_the_log_goes_through_the_console_of_a_live_picture_while_that_is_shown(capfd):
    logger = logging.getLogger("dsv3")
    before = (logger.level, list(logger.handlers), logger.propagate)
    picture = StringIO()
    try:
        show_log(level=logging.WARNING)
        with log_through(Console(file=picture)):
            get_logger("dsv3.test").warning("within")
        get_logger("dsv3.test").warning("afterwards")
    finally:
        logger.level, logger.handlers, logger.propagate = before
    assert picture.getvalue().split() == ["within"]
    assert capfd.readouterr().err.split() == ["afterwards"]
