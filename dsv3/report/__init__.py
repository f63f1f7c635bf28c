"""A run folder becomes one self-contained HTML page with its pictures."""

from dsv3.report.page import write_report

__all__ = ["write_report"]
