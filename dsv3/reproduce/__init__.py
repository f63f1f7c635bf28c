"""Tables and figures of the report, made again in small: one file an experiment, `catalogue.py` lists them."""
