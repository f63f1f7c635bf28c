"""TRL's GRPOTrainer on our exported model: `python -m grpo_parts.trl_peer EXPORT PROBLEMS SETTINGS SEED`.

The same prompts, reward, answers of a group, updates of a rollout, rate and loss; AdamW in FP32. Prints a line of JSON
for every iteration: the mean reward of its answers and the seconds until then, and ends when the reward is reached.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from dsv3.evals.final_answer import final_answer


class Clock(TrainerCallback):
    """Notes when each rollout's reward is known, and ends the training once it is high enough."""

    def __init__(self, *, enough: float, updates: int) -> None:
        self.enough, self.updates, self.began = enough, updates, 0.0
        self.reward, self.length = 0.0, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:  # noqa: ARG002
        if "reward" in logs:
            self.reward, self.length = logs["reward"], logs["completions/mean_length"]
        if "loss" in logs and state.global_step % self.updates == 0:
            line = {
                "iteration": state.global_step // self.updates,
                "reward": self.reward,
                "length": self.length,
                "seconds": time.perf_counter() - self.began,
            }
            print(json.dumps(line), file=sys.__stdout__, flush=True)
            control.should_training_stop = self.reward >= self.enough


def main() -> None:
    export, problems, settings, seed = sys.argv[1:]
    wanted = json.loads(settings)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with contextlib.redirect_stdout(sys.stderr):
        rows = [json.loads(line) for line in Path(problems).read_text().splitlines()]
        prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}], "wanted": row["answer"]} for row in rows]
        answers = wanted["problems_per_iteration"] * wanted["group_size"]
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(export),
            reward_funcs=is_right,
            train_dataset=Dataset.from_list(prompts),
            callbacks=[Clock(enough=wanted["enough"], updates=wanted["updates_per_rollout"])],
            args=GRPOConfig(
                output_dir=wanted["folder"],
                use_cpu=True,
                per_device_train_batch_size=answers // wanted["updates_per_rollout"],
                steps_per_generation=wanted["updates_per_rollout"],
                num_generations=wanted["group_size"],
                max_completion_length=wanted["max_answer_tokens"],
                max_steps=wanted["iterations"] * wanted["updates_per_rollout"],
                beta=wanted["kl_weight"],
                epsilon=0.2,
                learning_rate=wanted["rate"],
                lr_scheduler_type="constant",
                warmup_steps=0,
                weight_decay=0.0,
                adam_beta2=0.95,
                max_grad_norm=1.0,
                loss_type="grpo",
                scale_rewards="group",
                temperature=1.0,
                bf16=False,
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=int(seed),
            ),
        )
        trainer.train()


def is_right(completions: list[list[dict[str, str]]], wanted: list[str], **_: Any) -> list[float]:
    return [float(final_answer(said[0]["content"]) == one) for said, one in zip(completions, wanted, strict=True)]


if __name__ == "__main__":
    main()
