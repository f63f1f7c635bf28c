"""Raw text of any size to a corpus: read, mend, judge, mask, decontaminate, deduplicate, tokenise.

The engine is datatrove (Hugging Face): tasks, workers, Slurm and Ray. The steps are ours. Nothing here imports torch.
"""
