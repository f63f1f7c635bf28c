"""Which of torchrun's processes this is."""

import os


def num_ranks() -> int:
    """Return how many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_rank() -> bool:
    """Whether this is the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def ranks_on_this_machine() -> int:
    """Return how many of them run here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(num_ranks())))


def rank_on_this_machine() -> int:
    """Return which of them this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def num_restarts() -> int:
    """Return how often torchrun has started the ranks anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
