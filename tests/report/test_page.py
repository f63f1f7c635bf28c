import json
import re
from html.parser import HTMLParser
from importlib import util
from pathlib import Path

import pytest

from dsv3.errors import ConfigError
from dsv3.report.page import byte_size, plain, write_report

VOID = {"meta", "link", "img", "br", "input"}


def load_conftest():
    spec = util.spec_from_file_location("made_up_run", Path(__file__).with_name("conftest.py"))
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made_up = load_conftest()


class Balanced(HTMLParser):
    """Checks that tags close in the order they open, and gathers text, ids and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "data"):
                self.addresses.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.text.append(data)


def parse(path):
    page = path.read_text(encoding="utf-8")
    reader = Balanced()
    reader.feed(page)
    assert reader.open == []
    return page, reader, " ".join(" ".join(reader.text).split())


def test_the_page_needs_nothing_from_outside_and_stays_small(run_folder):
    page, reader, _ = parse(write_report(run_folder))
    assert all(address.startswith(("#", "data:")) for address in reader.addresses)
    assert not re.search(r"url\((?!#)|@import|<script", page)
    assert len(page) < 3_000_000


def test_every_id_is_unique_and_every_reference_within_the_page_leads_somewhere(run_folder):
    page, reader, _ = parse(write_report(run_folder))
    assert len(reader.ids) == len(set(reader.ids))
    wanted = {address[1:] for address in reader.addresses if address.startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted <= set(reader.ids)


def test_the_summary_tells_bits_per_byte_beside_the_baselines(run_folder):
    _, _, text = parse(write_report(run_folder))
    assert "2.08 bits for each byte" in text
    assert "23 % fewer than the best baseline (Kneser-Ney 3-gram: 2.71)" in text
    assert "not finished" not in text


def test_all_colours_of_pictures_are_those_of_the_theme(run_folder):
    page, _, _ = parse(write_report(run_folder))
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", svg)) <= {"none", "#ffffff"} | set(
            re.findall(r"var\(--[a-z0-9-]+\)", svg)
        )


def test_text_of_the_run_is_escaped(run_folder):
    lines = [
        {"kind": "sample", "step": 60, "prompt": "<script>alert(1)</script>", "text": "</pre><img src=x>"},
        {"kind": "validation", "step": 60, "bits_per_byte": 2.0, "by_source": {"<i>": 2.0, "&amp;": 1.0}},
    ]
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    page, _, text = parse(write_report(run_folder))
    assert "<script" not in page
    assert "<img src=x>" not in page
    assert "<script>alert(1)</script>" in text
    assert "a <odd> name.py" in text


def test_a_run_cut_off_in_the_middle_of_a_line_is_shown_and_said_to_be_unfinished(tmp_path):
    folder = made_up.make_run(tmp_path / "run", steps=60, share_done=0.3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 19, "los')
    _, _, text = parse(write_report(folder))
    assert "This run is not finished: 480K of 1.6M tokens (30 %)" in text
    assert "1 line(s) of metrics.jsonl are cut off" in text
    assert "has not been compared with the baselines yet" in text
    assert "composition of the corpus is not known" in text


@pytest.mark.parametrize(
    "missing", ["config.json", "metrics.jsonl", "evaluation.json", "samples.jsonl", "corpus/corpus.json"]
)
def test_any_missing_piece_leaves_a_page(run_folder, missing):
    (run_folder / missing).unlink()
    parse(write_report(run_folder))


def test_one_step_alone_is_enough_for_a_page(tmp_path):
    folder = made_up.make_run(tmp_path / "run", steps=60, share_done=1 / 60)
    parse(write_report(folder))


@pytest.mark.parametrize("value", [None, "text", [], {}, float("nan"), True, -1])
def test_odd_values_in_metrics_do_not_stop_the_page(run_folder, value):
    keys = ("step", "tokens", "loss", "mtp_loss", "grad_norm", "learning_rate", "max_violation", "seconds", "load")
    with (run_folder / "metrics.jsonl").open("a") as file:
        for key in keys:
            for kind in ("step", "load", "validation", "sample"):
                entry = {
                    "kind": kind,
                    "step": 61,
                    "tokens": 9,
                    "loss": 1.0,
                    "load": [[1, 2]],
                    "prompt": "p",
                    "text": "t",
                }
                file.write(json.dumps({**entry, key: value}) + "\n")
        file.write("7\n[]\nnull\n")
    (run_folder / "evaluation.json").write_text(json.dumps({"model": value, "baselines": value}))
    parse(write_report(run_folder))


def test_many_layers_and_experts_keep_the_page_below_three_megabytes(tmp_path):
    folder = made_up.make_run(tmp_path / "run", steps=400, num_layers=30)
    assert write_report(folder).stat().st_size < 3_000_000


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        write_report(tmp_path / "absent")


def test_a_report_that_cannot_be_written_leaves_the_old_one(run_folder, monkeypatch):
    path = write_report(run_folder)
    before = path.read_text()

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_report(run_folder)
    assert path.read_text() == before
    assert not list(run_folder.glob("*.partial"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (None, "null"),
        (14_800_000_000_000, "14,800,000,000,000"),
        (1e-6, "1e-06"),
        ([], "(none)"),
        ("", "(empty)"),
    ],
)
def test_settings_are_written_for_a_reader(value, text):
    assert plain(value) == text


def test_byte_sizes_are_decimal():
    assert [byte_size(count) for count in (812, 35_100, 7_200_000)] == ["812 B", "35.1 KB", "7.2 MB"]


def test_a_run_that_was_rewarded_shows_its_answers(tmp_path):
    records = [
        {
            "kind": "grpo",
            "step": n,
            "iteration": n,
            "scores": {"answer": n / 10},
            "kl": 0.01 * n,
            "entropy": 1.0,
            "length": 3,
        }
        for n in range(1, 6)
    ]
    records.append({"kind": "grpo_validation", "step": 5, "iteration": 5, "scores": {"answer": 0.5}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "config.json").write_text(json.dumps({"total_tokens": 1000}))
    (tmp_path / "grpo.json").write_text("{}")
    page = write_report(tmp_path).read_text()
    assert "answered problems in 5 iterations" in page
    assert "answer 0.50" in page
    assert 'id="answers"' in page
    assert "not finished" not in page


def write_benchmarks(folder, **changes):
    row = {"metric": "EM", "shots": 8, "protocol": "generate", "lm_eval": "", "count": 0, "score": None}
    row |= {"standard_error": None, "needs": "", "task": ""}
    results = {
        "limit": 50,
        "columns": ["V2-Base", "V3-Base"],
        "tasks": [{"task": "gsm8k", "score": 0.04, "troubles": [{"item": "7", "reason": "<b>"}], "num_cut": 2}],
        "rows": [
            row
            | {"benchmark": "GSM8K", "task": "gsm8k", "score": 0.04, "standard_error": 0.0277, "count": 49}
            | {"published": {"V2-Base": 81.6, "V3-Base": 89.3}},
            row | {"benchmark": "DROP", "needs": "data: DROP", "published": {"V2-Base": 80.4, "V3-Base": 89.0}},
        ],
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "results.json").write_text(json.dumps(results | changes))


def test_benchmarks_stand_beside_the_published_scores_with_what_is_missing(tmp_path):
    write_benchmarks(made_up.make_run(tmp_path / "run"))
    page, _, text = parse(write_report(tmp_path / "run"))
    assert "GSM8K EM 8 4.0 ± 2.8 49 81.6 89.3" in text
    assert "DROP: needs data: DROP" in text
    assert "the first 50 items were asked" in text
    assert "gsm8k, item 7: &lt;b&gt;" in page
    assert "gsm8k: 2 prompts were too long" in text


def test_a_run_without_benchmarks_has_no_such_section_and_damaged_ones_are_said_to_be_so(tmp_path):
    folder = made_up.make_run(tmp_path / "run")
    assert 'id="benchmarks"' not in parse(write_report(folder))[0]
    write_benchmarks(folder, rows=5)
    assert "evaluation/results.json is not as dsv3 eval run writes it" in parse(write_report(folder))[2]
