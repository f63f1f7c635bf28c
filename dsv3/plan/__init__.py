"""Plain arithmetic about a model or a run, without torch: parameters, FLOPs, memory."""
