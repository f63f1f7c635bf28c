"""A shuffled order that is computed, not stored: where place i of n goes, for any n, in constant memory."""

MASK = 2**64 - 1
ROUNDS = 6


def permuted(place: int, *, count: int, key: int) -> int:
    """Return where `place` goes in the shuffle named by `key` of the numbers below `count`; no two share a target.

    A Feistel network over the next power of four, walked until it lands below `count` again (fewer than four steps
    on average), which keeps it one-to-one.
    """
    assert 0 <= place < count
    half = max((count - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    while True:
        left, right = place >> half, place & low
        for turn in range(ROUNDS):
            left, right = right, left ^ (_scramble(right + (turn << 60) ^ key) & low)
        place = left << half | right
        if place < count:
            return place


def _scramble(value: int) -> int:
    """Mix 64 bits so that each depends on all: the finaliser of SplitMix64."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31
