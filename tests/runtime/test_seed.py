import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.runtime.seed import make_generator, stream_seed


def draws(seed: int, stream: str) -> list[float]:
    return torch.rand(4, generator=make_generator(seed, stream=stream)).tolist()


def test_the_same_seed_and_stream_give_the_same_numbers():
    assert draws(1, "weights") == draws(1, "weights")


@given(first=st.tuples(st.integers(0, 2**63 - 1), st.text()), second=st.tuples(st.integers(0, 2**63 - 1), st.text()))
def test_different_seeds_or_streams_give_different_numbers(first, second):
    if first != second:
        assert draws(*first) != draws(*second)


def test_neighbouring_seeds_and_streams_do_not_meet():
    seeds = {stream_seed(seed, stream=f"rows/{stream}") for seed in range(50) for stream in range(50)}
    assert len(seeds) == 2500


def test_the_seed_of_a_stream_is_63_bits_of_a_hash():
    expected = int(hashlib.sha256(b"7/sampling").hexdigest()[:16], 16) >> 1
    assert stream_seed(7, stream="sampling") == expected


def test_a_generator_leaves_the_global_one_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    torch.rand(9, generator=make_generator(3, stream="weights"))
    assert torch.equal(torch.rand(2), expected)
