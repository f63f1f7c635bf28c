"""Loss, optimiser, schedules, balance, the step and the loop of pre-training."""
