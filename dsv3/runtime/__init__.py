"""Where and how to compute: device, number type, seed, threads, log."""
