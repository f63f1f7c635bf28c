"""The benchmarks of the report whose data can be had, each with its prompt and its rule (report 4.4 and 5.3)."""

from dsv3.evals.question import EvalTask
from dsv3.evals.tasks.code_reasoning import CODE_REASONING
from dsv3.evals.tasks.continuations import CONTINUATIONS
from dsv3.evals.tasks.exams import EXAMS
from dsv3.evals.tasks.ifeval import INSTRUCTION_FOLLOWING
from dsv3.evals.tasks.mathematics import MATHEMATICS
from dsv3.evals.tasks.multiple_choice import MULTIPLE_CHOICE
from dsv3.evals.tasks.programs import PROGRAMS, pass_at_k
from dsv3.evals.tasks.reading import READING
from dsv3.evals.tasks.reasoning import REASONING

__all__ = ["TASKS", "pass_at_k"]

TASKS: dict[str, EvalTask] = {
    task.name: task
    for task in (
        *REASONING,
        *MULTIPLE_CHOICE,
        *CONTINUATIONS,
        *READING,
        *EXAMS,
        *PROGRAMS,
        *CODE_REASONING,
        *MATHEMATICS,
        *INSTRUCTION_FOLLOWING,
    )
}
"""By name. Nothing is read before a task's questions are asked for."""
