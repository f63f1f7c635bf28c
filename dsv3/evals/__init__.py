"""Measuring a model and the baselines it is measured against."""
