"""Chance that depends on content alone: the same on every machine, in every process and in any order of work."""

import hashlib


def hash_text(text: str) -> int:
    """Return 64 bits for a text; texts that differ only in the space around them get the same."""
    return _hash(text.strip().encode("utf-8", "surrogatepass"))


def hash_parts(*parts: str | int) -> int:
    """Return 64 bits for a list of names and numbers, to seed a generator or to decide by."""
    return _hash("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"))


def falls_below(hashed: int, *, rate: float) -> bool:
    """Tell whether a hash belongs to the given share of all hashes."""
    return hashed < rate * 2**64


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
