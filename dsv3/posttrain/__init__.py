"""How a model is taught: supervised fine-tuning, rewards, GRPO (report 5)."""
