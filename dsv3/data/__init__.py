"""Corpus to packed rows of tokens: documents, tokenizer, FIM, shards, packing, mixture, loader."""
