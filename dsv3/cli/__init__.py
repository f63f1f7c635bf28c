"""The command line: the only place that knows all the parts. One file a verb."""
