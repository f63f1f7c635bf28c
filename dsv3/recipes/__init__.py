"""Named runs: functions that return a config. Imports no torch."""
