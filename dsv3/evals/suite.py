"""The report's evaluations, row by row: what was measured, how, what was published, and what measures it here.

Every row has an answer: a task of ours, or what is missing for one, beside the name that lm-eval has for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv3.errors import ConfigError

if TYPE_CHECKING:
    from dsv3.evals.question import EvalTask

BASE_COLUMNS = ("V2-Base", "Qwen2.5-72B", "LLaMA-3.1-405B", "V3-Base")
"""Of report Table 3; the last is the model that this package is about."""
CHAT_COLUMNS = ("V2-0506", "V2.5-0905", "Qwen2.5-72B", "LLaMA-3.1-405B", "Claude-3.5-1022", "GPT-4o-0513", "V3")
"""Of report Table 6."""
TIE = 0.3
"""Scores that are no further apart are on a level (report 4.4.2)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One benchmark of a table."""

    benchmark: str
    """As the report names it."""
    metric: str
    """'EM', 'F1', 'pass@1', 'BPB' (bits per byte, fewer are better), and others as published."""
    shots: int | None
    """Worked examples before a question; None where the report names none."""
    protocol: str
    """As in `EvalTask`: 'rolling', 'choices' or 'generate'."""
    published: tuple[float | None, ...]
    """A score for each column of its table; None where none was published."""
    task: str = ""
    """Our task, by its name in `dsv3.evals.tasks`."""
    needs: str = ""
    """What there is to be had before it can be measured here; empty where we have a task."""
    lm_eval: str = ""
    """The nearest task of lm-eval; its prompt, protocol or split may be another."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks that are run together."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    limit: int | None = None
    """Items of a task that are asked where nothing else is said; None for all."""

    def tasks(self) -> tuple[str, ...]:
        """Return the names of our tasks in it, each once."""
        return tuple(dict.fromkeys(row.task for row in self.rows if row.task))

    def row_of(self, task: str) -> Row | None:
        """Return the row that a task is in."""
        return next((row for row in self.rows if row.task == task), None)

    def scores(self, row: Row) -> Mapping[str, float | None]:
        """Return what was published, by column."""
        return dict(zip(self.columns, row.published, strict=True))


def _ppl(benchmark: str, shots: int, *published: float, **more: str) -> Row:
    return Row(benchmark=benchmark, metric="EM", shots=shots, protocol="choices", published=published, **more)


def _gen(benchmark: str, metric: str, shots: int, *published: float, **more: str) -> Row:
    return Row(benchmark=benchmark, metric=metric, shots=shots, protocol="generate", published=published, **more)


def _chat(benchmark: str, metric: str, *published: float | None, shots: int | None = None, **more: str) -> Row:
    return Row(benchmark=benchmark, metric=metric, shots=shots, protocol="generate", published=published, **more)


BASE = (
    Row(
        benchmark="Pile-test",
        metric="BPB",
        shots=0,
        protocol="rolling",
        published=(0.606, 0.638, 0.542, 0.548),
        needs="data: the test split of the Pile, whose licences are disputed; `dsv3 evaluate` scores any other text",
        lm_eval="pile_10k",
    ),
    _gen("BBH", "EM", 3, 78.8, 79.8, 82.9, 87.5, task="bbh", lm_eval="bbh_cot_fewshot"),
    _ppl("MMLU", 5, 78.4, 85.0, 84.4, 87.1, task="mmlu", lm_eval="mmlu"),
    _ppl(
        "MMLU-Redux",
        5,
        *(75.6, 83.2, 81.3, 86.2),
        needs="data: MMLU-Redux, corrected questions of MMLU",
        lm_eval="mmlu_redux_generative",
    ),
    _ppl(
        "MMLU-Pro",
        5,
        *(51.4, 58.3, 52.8, 64.4),
        task="mmlu_pro",
        lm_eval="mmlu_pro",
    ),
    _gen("DROP", "F1", 3, 80.4, 80.6, 86.0, 89.0, needs="data: DROP", lm_eval="drop"),
    _ppl("ARC-Easy", 25, 97.6, 98.4, 98.4, 98.9, task="arc_easy", lm_eval="arc_easy"),
    _ppl("ARC-Challenge", 25, 92.2, 94.5, 95.3, 95.3, task="arc_challenge", lm_eval="arc_challenge"),
    _ppl("HellaSwag", 10, 87.1, 84.8, 89.2, 88.9, task="hellaswag", lm_eval="hellaswag"),
    _ppl("PIQA", 0, 83.9, 82.6, 85.9, 84.7, task="piqa", lm_eval="piqa"),
    _ppl("WinoGrande", 5, 86.3, 82.3, 85.2, 84.9, task="winogrande", lm_eval="winogrande"),
    _ppl("RACE-Middle", 5, 73.1, 68.1, 74.2, 67.1, needs="data: RACE, whose licence allows research alone"),
    _ppl(
        "RACE-High",
        5,
        *(52.6, 50.3, 56.8, 51.3),
        needs="data: RACE, whose licence allows research alone",
        lm_eval="race",
    ),
    _gen("TriviaQA", "EM", 5, 80.0, 71.9, 82.7, 82.9, needs="data: TriviaQA", lm_eval="triviaqa"),
    _gen("NaturalQuestions", "EM", 5, 38.6, 33.2, 41.5, 40.0, task="nq_open", lm_eval="nq_open"),
    _gen("AGIEval", "EM", 0, 57.5, 75.8, 60.6, 79.6, task="agieval", lm_eval="agieval"),
    _gen("HumanEval", "pass@1", 0, 43.3, 53.0, 54.9, 65.2, task="humaneval", lm_eval="humaneval"),
    _gen("MBPP", "pass@1", 3, 65.0, 72.6, 68.4, 75.4, task="mbpp", lm_eval="mbpp"),
    _gen(
        "LiveCodeBench-Base (0801-1101)",
        "pass@1",
        3,
        *(11.6, 12.9, 15.5, 19.4),
        needs="data: LiveCodeBench's problems of August to November 2024, with their hidden tests",
    ),
    _gen("CRUXEval-I", "EM", 2, 52.5, 59.1, 58.5, 67.3, task="cruxeval_i", lm_eval="cruxeval_input"),
    _gen("CRUXEval-O", "EM", 2, 49.8, 59.9, 59.9, 69.8, task="cruxeval_o", lm_eval="cruxeval_output"),
    _gen("GSM8K", "EM", 8, 81.6, 88.3, 83.5, 89.3, task="gsm8k", lm_eval="gsm8k_cot"),
    _gen("MATH", "EM", 4, 43.4, 54.4, 49.0, 61.6, task="math", lm_eval="minerva_math"),
    _gen("MGSM", "EM", 8, 63.6, 76.2, 69.9, 79.8, task="mgsm", lm_eval="mgsm_cot_native"),
    _gen("CMath", "EM", 3, 78.7, 84.5, 77.3, 90.7, task="cmath"),
    _gen("CLUEWSC", "EM", 5, 82.0, 82.5, 83.0, 82.7, needs="data: CLUEWSC"),
    _ppl(
        "C-Eval",
        5,
        *(81.4, 89.2, 72.5, 90.1),
        needs="data: C-Eval, whose licence forbids commercial use",
        lm_eval="ceval-valid",
    ),
    _ppl(
        "CMMLU",
        5,
        *(84.0, 89.5, 73.7, 88.8),
        needs="data: CMMLU, whose licence forbids commercial use",
        lm_eval="cmmlu",
    ),
    _gen("CMRC", "EM", 1, 77.4, 75.8, 76.0, 76.3, task="cmrc"),
    _ppl("C3", 0, 77.4, 76.7, 79.7, 78.6, needs="data: C3"),
    _ppl("CCPM", 0, 93.0, 88.5, 78.6, 92.0, needs="data: CCPM"),
    _ppl(
        "MMMLU-non-English",
        5,
        *(64.0, 74.8, 73.8, 79.4),
        needs="data: MMMLU, which is MMLU in 14 other languages",
        lm_eval="openai_mmlu",
    ),
)
"""Report Table 3."""

_CONTESTS = "data: the problems, and 16 answers of each at temperature 0.7, where our tasks take one greedy answer"
_LIVE_CODE = "data: LiveCodeBench's problems of August to November 2024, with their hidden tests"
CHAT = (
    _chat(
        "MMLU",
        "EM",
        *(78.2, 80.6, 85.3, 88.6, 88.3, 87.2, 88.5),
        task="mmlu_chat",
        lm_eval="mmlu_generative",
    ),
    _chat(
        "MMLU-Redux",
        "EM",
        *(77.9, 80.3, 85.6, 86.2, 88.9, 88.0, 89.1),
        shots=0,
        needs="data: MMLU-Redux, and the prompt of Zero-Eval",
        lm_eval="mmlu_redux_generative",
    ),
    _chat("MMLU-Pro", "EM", *(58.5, 66.2, 71.6, 73.3, 78.0, 72.6, 75.9), task="mmlu_pro_chat", lm_eval="mmlu_pro"),
    _chat("DROP", "F1", *(83.0, 87.8, 76.7, 88.7, 88.3, 83.7, 91.6), shots=3, needs="data: DROP", lm_eval="drop"),
    _chat("IF-Eval", "prompt strict", *(57.7, 80.6, 84.1, 86.0, 86.5, 84.3, 86.1), task="ifeval", lm_eval="ifeval"),
    _chat(
        "GPQA-Diamond",
        "pass@1",
        *(35.3, 41.3, 49.0, 51.1, 65.0, 49.9, 59.1),
        needs="data: GPQA, whose authors ask that it be put nowhere in plain text",
        lm_eval="gpqa_diamond_cot_zeroshot",
    ),
    _chat("SimpleQA", "correct", *(9.0, 10.2, 9.1, 17.1, 28.4, 38.2, 24.9), needs="a judge model; data: SimpleQA"),
    _chat(
        "FRAMES",
        "accuracy",
        *(66.9, 65.4, 69.8, 70.0, 72.5, 80.5, 73.3),
        needs="a judge model; data: FRAMES and the articles it asks about",
    ),
    _chat(
        "LongBench v2",
        "accuracy",
        *(31.6, 35.4, 39.4, 36.1, 41.0, 48.1, 48.7),
        needs="data: LongBench v2; a context of 128K tokens",
        lm_eval="longbench2",
    ),
    _chat(
        "HumanEval-Mul",
        "pass@1",
        *(69.3, 77.4, 77.3, 77.2, 81.7, 80.5, 82.6),
        needs="data: HumanEval in Java, C++, C#, JavaScript, TypeScript, PHP and Bash; what compiles and runs these",
    ),
    _chat(
        "LiveCodeBench (CoT, Aug-Nov 2024)",
        "pass@1",
        *(18.8, 29.2, 31.1, 28.4, 36.3, 33.4, 40.5),
        needs=_LIVE_CODE,
    ),
    _chat("LiveCodeBench (Aug-Nov 2024)", "pass@1", *(20.3, 28.4, 28.7, 30.1, 32.8, 34.2, 37.6), needs=_LIVE_CODE),
    _chat(
        "Codeforces",
        "percentile",
        *(17.5, 35.6, 24.8, 25.3, 20.3, 23.6, 51.6),
        needs="data: contests of Codeforces with their hidden tests, and the ratings of those who took part",
    ),
    _chat(
        "SWE-bench Verified (Agentless)",
        "resolved",
        *(None, 22.6, 23.8, 24.5, 50.8, 38.8, 42.0),
        needs="docker: an image for each repository; the Agentless framework",
    ),
    _chat(
        "Aider-Edit (diff)",
        "accuracy",
        *(60.3, 71.6, 65.4, 63.9, 84.2, 72.9, 79.7),
        needs="docker: Aider's benchmark edits and runs programs within it",
    ),
    _chat(
        "Aider-Polyglot (diff)",
        "accuracy",
        *(None, 18.2, 7.6, 5.8, 45.3, 16.0, 49.6),
        needs="docker: Aider's benchmark edits and runs programs of six languages within it",
    ),
    _chat("AIME 2024", "pass@1", *(4.6, 16.7, 23.3, 23.3, 16.0, 9.3, 39.2), needs=_CONTESTS, lm_eval="aime24"),
    _chat("MATH-500", "EM", *(56.3, 74.7, 80.0, 73.8, 78.3, 74.6, 90.2), task="math500", lm_eval="hendrycks_math500"),
    _chat("CNMO 2024", "pass@1", *(2.8, 10.8, 15.9, 6.8, 13.1, 10.8, 43.2), needs=_CONTESTS),
    _chat("CLUEWSC", "EM", *(89.9, 90.4, 91.4, 84.7, 85.4, 87.9, 90.9), needs="data: CLUEWSC"),
    _chat(
        "C-Eval",
        "EM",
        *(78.6, 79.5, 86.1, 61.5, 76.7, 76.0, 86.5),
        needs="data: C-Eval, whose licence forbids commercial use",
        lm_eval="ceval-valid",
    ),
    _chat(
        "C-SimpleQA",
        "correct",
        *(48.5, 54.1, 48.4, 50.4, 51.3, 59.3, 64.8),
        needs="a judge model; data: Chinese SimpleQA",
    ),
)
"""Report Table 6. Answers had at most 8,192 tokens; of sets below 1,000 items several runs were averaged."""

_QUICK = ("arc_easy", "hellaswag", "piqa", "winogrande", "nq_open", "humaneval", "cruxeval_o", "gsm8k", "cmath")

SUITES = {
    "base": Suite(name="base", columns=BASE_COLUMNS, rows=BASE),
    "chat": Suite(name="chat", columns=CHAT_COLUMNS, rows=CHAT),
    "quick": Suite(name="quick", columns=BASE_COLUMNS, rows=tuple(row for row in BASE if row.task in _QUICK), limit=50),
}
"""By name; 'quick' is nine rows of 'base' with fifty items each, to see within minutes whether anything works."""


def suite_named(name: str) -> Suite:
    """Return a suite.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in SUITES:
        raise ConfigError(f"there is no suite '{name}'; choose one of {', '.join(SUITES)}")
    return SUITES[name]


def chosen_tasks(suite: Suite, *, names: tuple[str, ...], known: "Mapping[str, EvalTask]") -> "tuple[EvalTask, ...]":
    """Return the tasks that are named, or those of a suite where none is.

    Raises:
        ConfigError: a name is none of a task; says what a row of the suite lacks if it is that row's.
    """
    rows = {row.benchmark.lower(): row for row in suite.rows}
    chosen = []
    for name in dict.fromkeys(names or suite.tasks()):
        if name not in known:
            row = rows.get(name.lower())
            lacks = f"{row.benchmark} needs {row.needs}" if row is not None and row.needs else f"'{name}' is no task"
            raise ConfigError(f"{lacks}; the tasks are {', '.join(known)}")
        chosen.append(known[name])
    return tuple(chosen)
