"""The report's 3.3 and the published weight format: E4M3 values with block scales."""
