"""Pages arrive as they were sent, in order, from those who know the secret."""

import time

import msgspec
import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import EngineError
from dsv3.infer.handover import Handover, MtpHandover
from dsv3.serve.page_transfer import Incoming, Pages, Parcel, Rest, SocketTransport, Way, handover_of


@pytest.fixture
def ends():
    with zmq.Context() as context:
        one, other = (SocketTransport(context, secret="s") for _ in range(2))
        yield one, other
        one.close()
        other.close()


def arrived(transport, count, *, seconds=10.0):
    parcels, deadline = [], time.monotonic() + seconds
    while len(parcels) < count:
        assert time.monotonic() < deadline, f"{len(parcels)} of {count}"
        transport.inward.poll(50)
        parcels += transport.poll()
    return parcels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_sent_arrives_to_the_bit_and_in_order(ends, dtype):
    one, other = ends
    sent = [torch.randn(3, place + 1, 4, 5).to(dtype) for place in range(20)]
    way = Way(one, to=other.address, request_id="r", first_page=2)
    for place, entries in enumerate(sent):
        way.send(entries, first_page=place)
    way.finish(Handover(token=7, num_computed=80))
    parcels = arrived(other, 21)
    assert [parcel.note for parcel in parcels[:-1]] == [Pages("r", place) for place in range(20)]
    for parcel, entries in zip(parcels, sent, strict=False):
        assert parcel.tensor.dtype == dtype
        assert parcel.tensor.equal(entries)
    assert handover_of(parcels[-1].note, parcels[-1].tensor) == Handover(token=7, num_computed=80)


def test_the_states_of_each_module_arrive(ends):
    one, other = ends
    states = torch.randn(3, 6)
    past = (
        MtpHandover(done=4, unread=states[:2]),
        MtpHandover(done=6, unread=None),
        MtpHandover(done=5, unread=states[2:]),
    )
    Way(one, to=other.address, request_id="r", first_page=0).finish(Handover(token=1, num_computed=9, mtp=past))
    (parcel,) = arrived(other, 1)
    found = handover_of(parcel.note, parcel.tensor)
    assert [one.done for one in found.mtp] == [4, 6, 5]
    assert found.mtp[0].unread.equal(states[:2])
    assert found.mtp[1].unread is None
    assert found.mtp[2].unread.equal(states[2:])


@pytest.mark.parametrize("frames", [[b"junk"], [b"junk", b"more"], [b"", b"", b""]])
def test_what_others_send_is_dropped_and_harms_nothing(ends, frames):
    one, other = ends
    with zmq.Context() as context:
        stranger = SocketTransport(context, secret="guessed")
        stranger.start(Parcel(note=Pages("r", 0), tensor=torch.zeros(1, 1, 1, 1)), to=other.address)
        with context.socket(zmq.PUSH) as socket:
            socket.connect(other.address)
            socket.send_multipart(frames)
            time.sleep(0.2)
            Way(one, to=other.address, request_id="mine", first_page=0).send(torch.zeros(1, 1, 1, 1), first_page=0)
            (parcel,) = arrived(other, 1)
            socket.close(linger=0)
        stranger.close()
    assert parcel.note.id == "mine"


def test_a_shape_that_does_not_fit_its_bytes_is_dropped(ends):
    _, other = ends
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(other.address)
        envelope = {"secret": "s", "note": {"type": "Pages", "id": "r", "first_page": 0}, "dtype": "float32"}
        socket.send_multipart([msgspec.msgpack.encode(envelope | {"shape": [2, 2]}), bytes(12)])
        socket.send_multipart([msgspec.msgpack.encode(envelope | {"shape": [3]}), bytes(12)])
        (parcel,) = arrived(other, 1)
        assert parcel.tensor.shape == (3,)
        socket.close(linger=0)


def test_aborting_gives_up_what_has_not_arrived_and_nothing_waits(ends):
    one, other = ends
    one.start(Parcel(note=Pages("r", 0), tensor=torch.zeros(1, 1, 1, 1)), to="tcp://127.0.0.1:9")
    one.abort("tcp://127.0.0.1:9")
    one.abort("tcp://127.0.0.1:9")
    one.start(Parcel(note=Pages("r", 1), tensor=torch.zeros(1, 1, 1, 1)), to=other.address)
    assert [parcel.note for parcel in arrived(other, 1)] == [Pages("r", 1)]


@settings(deadline=None)
@given(st.integers(0, 3), st.lists(st.integers(1, 3), max_size=5), st.data())
def test_pages_that_are_lacking_or_come_twice_are_seen(first, counts, data):
    """A line that breaks loses messages: whichever one is lost, or repeated, the request is not taken for whole."""
    starts = [first + sum(counts[:place]) for place in range(len(counts))]
    total = first + sum(counts)
    notes = list(zip(starts, counts, strict=True))
    rest = Rest(id="r", token=0, num_computed=total * 4 - data.draw(st.integers(0, 3)) if total else 0, mtp=[])
    change = data.draw(st.sampled_from(["none", "lost", "twice"])) if notes else "none"
    if change != "none":
        place = data.draw(st.integers(0, len(notes) - 1))
        notes = notes[:place] + notes[place : place + 1] * (0 if change == "lost" else 2) + notes[place + 1 :]
    incoming = Incoming(first_page=first, page_tokens=4)

    def take_all():
        for start, count in notes:
            incoming.take(Pages("r", start), entries=torch.zeros(1, count, 4, 2))
        incoming.end(rest)

    if change == "none":
        take_all()
        assert incoming.num_bytes == sum(counts) * 4 * 2 * 4
    else:
        with pytest.raises(EngineError, match="the line had broken"):
            take_all()
