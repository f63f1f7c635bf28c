"""Independent streams of random numbers from one seed."""

import hashlib

import torch


def stream_seed(seed: int, *, stream: str) -> int:
    """Return the seed of a named stream: 63 bits of a hash over both.

    Adding numbers to a seed would make stream 1 of seed 0 equal stream 0 of seed 1; a hash keeps all of them apart.
    """
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(seed: int, *, stream: str) -> torch.Generator:
    """Return a CPU generator for one purpose, such as 'weights' or 'sampling', that shares nothing with other streams.

    The same seed and stream give the same numbers on every machine and in every process.
    """
    return torch.Generator().manual_seed(stream_seed(seed, stream=stream))
