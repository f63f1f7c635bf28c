"""Load on a server: what is asked of it, when, and how long it took."""

from dsv3.serve.load.drive import run_load
from dsv3.serve.load.measure import LoadSummary, Outcome, summarise
from dsv3.serve.load.workload import LoadConfig

__all__ = ["LoadConfig", "LoadSummary", "Outcome", "run_load", "summarise"]
