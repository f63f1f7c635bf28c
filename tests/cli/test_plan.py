import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dsv3.cli import plan as plan_verb
from dsv3.cli.main import Options, build_app
from dsv3.cli.plan_text import amount
from dsv3.errors import ConfigError

PUBLISHED = ["plan", "v3_671b", "--gpus", "2048", "--gpu", "h800"]
SOURCES = {"computed", "published", "assumption", "fitted"}


def run(*arguments):
    return CliRunner().invoke(build_app(Options()), list(arguments), catch_exceptions=False)


@pytest.fixture(scope="module")
def published():
    return json.loads(run(*PUBLISHED, "--json").output)


def test_the_published_run_as_json(published):
    """Fact sheet 3.4, each within 5 %."""
    for found, wanted in (
        (published["step_seconds"], 19.9),
        (published["tokens_per_second"], 3.16e6),
        (published["mfu_causal"], 0.389),
        (published["gpu_hours"]["pretrain"], 2_664_000),
        (published["gpu_hours"]["context"], 119_000),
        (published["gpu_hours"]["post"], 5_000),
        (published["gpu_hours"]["total"], 2_788_000),
        (published["dollars"], 5_576_000),
    ):
        assert found == pytest.approx(wanted, rel=0.05)
    assert published["parameters"]["total"] == 671_026_419_200
    assert 0 < published["bubble_fraction"] < 0.2
    kinds = ("weights", "master", "gradients", "moments", "activations", "fp8_caches", "buffers", "system")
    held = published["bytes_per_rank"]
    assert held["total"] == sum(held[kind] for kind in kinds)


def test_every_line_says_where_it_comes_from_and_one_is_fitted(published):
    assert {line["source"] for line in published["lines"]} == SOURCES
    assert all(line["why"] for line in published["lines"])
    fitted = [line["name"] for line in published["lines"] if line["source"] == "fitted"]
    assert fitted == ["tokens of the busiest experts"]


def test_published_numbers_stand_beside_the_plan_of_the_published_run_only(published):
    assert sum(line["published"] is not None for line in published["lines"]) > 10
    other = json.loads(run("plan", "tiny", "--json").output)
    assert not any(line["published"] for line in other["lines"])


def test_the_text_has_the_same_lines_and_the_published_layout_fits(published):
    """It ran (report 3.2)."""
    told = run(*PUBLISHED).output
    assert "128 pipelines of 16, experts over 64, schedule dualpipe, 120 micro-batches each" in told
    assert "fitted: more than the mean" in told
    assert published["bytes_per_rank"]["fits"]
    assert all(line["name"] in told for line in published["lines"])


def test_a_layout_that_does_not_fit_says_which_split_of_its_layers_does():
    told = run(*PUBLISHED, "--set", "parallel.stage_layers=[]").output
    assert "It does not fit: ranks 0-127, 1920-2047" in told
    assert "--set parallel.stage_layers=[3," in told


def test_a_recipe_s_split_of_layers_is_for_its_own_pipeline():
    found = json.loads(run("plan", "v3_671b", "--gpus", "2048", "--pp", "8", "--json").output)
    assert (found["parallel"]["pipeline"], found["parallel"]["stage_layers"]) == (8, [])


@pytest.mark.parametrize("recipe", ["tiny", "small", "v3_16b", "v3_236b"])
def test_every_recipe_plans(recipe):
    found = json.loads(run("plan", recipe, "--json").output)
    assert found["gpus"] == 1
    assert found["step_seconds"] > 0
    assert found["gpu_hours"]["post"] == 0


def test_options_lay_out_the_run():
    found = json.loads(
        run("plan", "small", "--pp", "2", "--ep", "2", "--dp", "4", "--schedule", "1f1b", "--json").output
    )
    parallel = found["parallel"]
    assert (found["gpus"], parallel["pipeline"], parallel["expert"], parallel["schedule"]) == (8, 2, 2, "1f1b")


def test_a_price_and_hours_of_post_training_can_be_given():
    found = json.loads(run("plan", "tiny", "--dollars-per-hour", "3", "--post-hours", "7", "--json").output)
    assert found["gpu_hours"]["post"] == 7
    assert found["dollars"] == pytest.approx(3 * found["gpu_hours"]["total"])


def test_fit_proposes_a_layout_and_says_why_others_lose():
    told = run("plan", "tiny", "--gpus", "2", "--fit").output
    assert "layouts run; the fastest:" in told
    assert "the fastest" in told
    assert "slower: " in told
    assert "lose by divisibility" in told
    found = json.loads(run("plan", "tiny", "--gpus", "2", "--fit", "--json").output)
    assert found["layouts"][0]["why"] == "the fastest"


def test_pictures_are_drawn_when_asked_for(tmp_path):
    gantt, memory = tmp_path / "gantt.png", tmp_path / "memory.png"
    run("plan", "tiny", "--gpus", "2", "--pp", "2", "--gantt", str(gantt), "--memory", str(memory))
    assert gantt.read_bytes().startswith(b"\x89PNG")
    assert memory.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tiny", "--dp", "3", "--gpus", "2"], "3 pipelines of 1 are 3 GPUs, not 2"),
        (["tiny", "--fit", "--pp", "2"], "--fit looks for a layout; leave out --pp"),
        (["tiny", "--hardware", "fast"], "write it as NAME=NUMBER"),
        (["tiny", "--gpu", "custom"], "a custom GPU needs"),
        (["v3_671b", "--gpus", "2048", "--gpu", "a100"], "use --set precision.recipe=original"),
        (["tiny", "--ep", "3"], "use a divisor of 16"),
        (["tin"], "did you mean 'tiny'"),
    ],
)
def test_mistakes_are_told(arguments, told):
    with pytest.raises(ConfigError, match=told):
        run("plan", *arguments)


def test_the_help_is_that_of_the_plan_of_a_run_and_names_other_plans(monkeypatch):
    def register_plan_other(plan_app):
        plan_app.command("other")(lambda: print("another plan"))

    monkeypatch.setattr(plan_verb, "BELOW", ("plan_other",))
    monkeypatch.setattr(plan_verb, "find_spec", lambda name: name)
    monkeypatch.setattr(
        plan_verb, "import_module", lambda name: type("M", (), {"register_plan_other": register_plan_other})
    )
    assert run("plan", "other").output == "another plan\n"
    told = run("plan", "--help").output
    assert "RECIPE" in told
    assert "--gpus" in told
    assert "dsv3 plan other" in told


def test_a_plan_imports_neither_torch_nor_numpy():
    code = (
        "import sys\nfrom dsv3.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    print('loaded:', {'torch', 'numpy', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    finished = subprocess.run([sys.executable, "-c", code, *PUBLISHED], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.endswith("loaded: set()\n")


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [
        (0.389, "share", "38.9%"),
        (5_576_000.0, "USD", "$5,576,000"),
        (19.926, "seconds", "19.93 s"),
        (0.00436, "seconds", "4.36 ms"),
        (85.9e9, "bytes", "85.90 GB"),
        (671_026_419_200, "", "671,026,419,200"),
        (0, "bytes", "0 B"),
    ],
)
def test_amounts_are_told_in_units_of_their_size(value, unit, told):
    assert amount(value, unit=unit) == told
