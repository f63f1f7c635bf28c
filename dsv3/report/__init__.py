"""A run folder to one self-contained HTML page with its pictures."""
