import resource
import subprocess
import sys

import pytest
import typer

from dsv3 import __version__
from dsv3.cli import main as command_line
from dsv3.errors import ConfigError, MissingExtraError


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from dsv3.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def run_verb(verb, *arguments, monkeypatch, capsys):
    """Run the command line with one verb of ours, in this process."""

    def build_app(options, verbs=()):
        app = real_build_app(options)
        app.command("probe")(verb)
        return app

    real_build_app = command_line.build_app
    monkeypatch.setattr(command_line, "build_app", build_app)
    monkeypatch.setattr(command_line, "show_log", lambda level: None)
    with pytest.raises(SystemExit) as left:
        command_line.main([*arguments, "probe"])
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


def test_help_answers_within_a_second_of_cpu():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.returncode == 0
    assert "inspect" in finished.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "v3_671b"], ["inspect", "tiny", "--against", "report"]])
def test_help_and_inspect_import_neither_torch_nor_numpy(arguments):
    code = (
        "import sys\nfrom dsv3.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    print('loaded:', {'torch', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    finished = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.endswith("loaded: set()\n")


def test_every_verb_of_the_list_is_registered_in_its_order():
    app = command_line.build_app(command_line.Options())
    names = [info.name for info in [*app.registered_commands, *app.registered_groups]]
    assert names == list(command_line.VERBS)


def test_no_argument_prints_the_help():
    finished = run()
    assert finished.returncode == 0
    assert finished.stdout.startswith("Usage: dsv3")


def test_the_version_is_that_of_the_package():
    finished = run("--version")
    assert (finished.returncode, finished.stdout) == (0, f"dsv3 {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspct"], "error: No such command 'inspct'. Did you mean 'inspect'?"),
        (["inspect"], "error: Missing argument 'WHAT'"),
        (["inspect", "tiny", "--jsn"], "error: No such option: --jsn"),
        (["inspect", "tiny", "--context", "many"], "error: Invalid value for '--context'"),
        (["inspect", "tiny", "--set", "optim.lerning_rate=1"], "did you mean 'optim.learning_rate'?"),
        (["inspect", "tniy"], "error: unknown recipe 'tniy'; did you mean 'tiny'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message):
    finished = run(*arguments)
    assert finished.returncode == 2
    assert message in finished.stderr
    assert finished.stderr.startswith("error: ")
    assert finished.stderr.count("\n") == 1
    assert finished.stdout == ""


def test_a_misspelt_setting_gives_exactly_the_promised_line():
    finished = run("inspect", "tiny", "--set", "optim.lerning_rate=1")
    assert finished.stderr == "error: unknown key 'optim.lerning_rate'; did you mean 'optim.learning_rate'?\n"


def test_an_error_of_ours_is_told_without_a_traceback(monkeypatch, capsys):
    def verb() -> None:
        raise ConfigError("first line\n  second line")

    code, _, err = run_verb(verb, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, err) == (2, "error: first line second line\n")


def test_a_missing_extra_says_how_to_install_it(monkeypatch, capsys):
    def verb() -> None:
        raise MissingExtraError(package="datasets", extra="data", purpose="hf://NAME")

    code, _, err = run_verb(verb, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "pip install 'dsv3[data]'" in err


def test_a_full_disk_names_the_file(monkeypatch, capsys):
    def verb() -> None:
        raise OSError(28, "No space left on device", "runs/x/shard.npy")

    code, _, err = run_verb(verb, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, err) == (2, "error: No space left on device: runs/x/shard.npy\n")


def test_the_traceback_flag_lets_the_error_through(monkeypatch):
    def build_app(options, verbs=()):
        app = typer.Typer()

        @app.callback()
        def nothing() -> None:
            options.traceback = True

        @app.command("probe")
        def verb() -> None:
            raise ConfigError("refused")

        return app

    monkeypatch.setattr(command_line, "build_app", build_app)
    with pytest.raises(ConfigError, match="refused"):
        command_line.main(["probe"])


def test_the_traceback_flag_shows_where_an_error_came_from():
    finished = run("--traceback", "inspect", "tniy")
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr
    assert "by_name" in finished.stderr


def test_an_interrupt_leaves_with_130_and_no_traceback(monkeypatch, capsys):
    def verb() -> None:
        raise KeyboardInterrupt

    code, _, err = run_verb(verb, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 130
    assert "Traceback" not in err


def test_a_verb_may_choose_its_exit_code(monkeypatch, capsys):
    def verb() -> None:
        raise typer.Exit(3)

    assert run_verb(verb, monkeypatch=monkeypatch, capsys=capsys)[0] == 3


def test_a_bug_of_ours_is_not_dressed_up_as_a_mistake_of_the_user(monkeypatch):
    def build_app(options, verbs=()):
        app = typer.Typer()

        @app.callback()
        def nothing() -> None:
            pass

        @app.command("probe")
        def verb() -> None:
            raise ZeroDivisionError

        return app

    monkeypatch.setattr(command_line, "build_app", build_app)
    with pytest.raises(ZeroDivisionError):
        command_line.main(["probe"])
