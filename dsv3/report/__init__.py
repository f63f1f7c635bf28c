"""A run folder becomes one self-contained HTML page with its pictures."""
