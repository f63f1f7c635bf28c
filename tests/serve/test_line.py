"""A line is had by those who know the secret, and carries nothing else than what its ends have said."""

import asyncio
from functools import partial

import pytest

from dsv3.config.address import Address, read_address
from dsv3.errors import ConfigError
from dsv3.serve.line import LineEndedError, answer, call


async def ends(use, *, secrets=("s", "s"), between=None, handler=None):
    """Let a caller and a called meet; `between` changes the bytes that go from the caller to the called."""
    met = asyncio.get_running_loop().create_future()

    async def take(reader, writer):
        try:
            met.set_result(await answer(reader, writer, secret=secrets[1], seconds=5.0))
        except LineEndedError as error:
            met.set_exception(error)

    server = await asyncio.start_server(handler or take, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    if between is not None:
        relay = await asyncio.start_server(partial(relayed, port=port, change=between), "127.0.0.1", 0)
        port = relay.sockets[0].getsockname()[1]
    try:
        one = await call(Address(host="127.0.0.1", port=port), secret=secrets[0], seconds=0.5)
        await use(one, await met)
        for line in (one, await met):
            await line.closed(seconds=5.0)
    finally:
        await asyncio.sleep(0.02)
        if met.done():
            met.exception()
        server.close()
        if between is not None:
            relay.close()


async def relayed(reader, writer, *, port, change):
    other_reader, other_writer = await asyncio.open_connection("127.0.0.1", port)

    async def pump(source, target, change):
        count = 0
        while octets := await source.read(1 << 16):
            for piece in change(octets, count):
                target.write(piece)
            count += 1
        target.close()
        await target.wait_closed()

    await asyncio.gather(pump(reader, other_writer, change), pump(other_reader, writer, lambda octets, _: [octets]))


def test_what_is_said_is_heard_in_order_both_ways():
    async def use(one, other):
        for size in (0, 1, 100_000):
            one.send(bytes(size))
            other.send(b"x" * size)
        assert [len(await other.receive()) for _ in range(3)] == [0, 1, 100_000]
        assert [await one.receive() for _ in range(3)] == [b"", b"x", b"x" * 100_000]
        assert (one.peer, one.own_host) == ("127.0.0.1", "127.0.0.1")
        one.close()
        with pytest.raises(LineEndedError, match="has ended"):
            await other.receive()
        other.send(b"to nobody")

    asyncio.run(ends(use))


def test_another_secret_is_told_to_the_caller():
    with pytest.raises(ConfigError, match="another secret; give both the same --secret-file"):
        asyncio.run(ends(None, secrets=("s", "t")))


@pytest.mark.parametrize(
    ("change", "is_repeated"),
    [(lambda octets: [octets[:-1] + bytes([octets[-1] ^ 1])], False), (lambda octets: [octets, octets], True)],
    ids=["changed", "said again"],
)
def test_what_is_changed_or_repeated_on_the_way_ends_the_line(change, is_repeated):
    async def use(one, other):
        one.send(b"give the worker an end")
        if is_repeated:
            await other.receive()
        with pytest.raises(LineEndedError, match="does not have its signature"):
            await other.receive()

    # The first bytes are the proof; what is said comes after.
    asyncio.run(ends(use, between=lambda octets, count: change(octets) if count else [octets]))


def test_whoever_cannot_be_reached_or_is_somebody_else_is_named():
    async def use():
        with pytest.raises(ConfigError, match=r"cannot reach 127.0.0.1:1: .*refused; .*--workers-at"):
            await call(Address(host="127.0.0.1", port=1), secret="s", seconds=2.0)
        with pytest.raises(ConfigError, match=r"cannot reach no-such-host.invalid:1"):
            await call(Address(host="no-such-host.invalid", port=1), secret="s", seconds=2.0)

    async def web(reader, writer):
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def silent(reader, writer):
        try:
            await asyncio.sleep(5)
        finally:
            writer.close()

    asyncio.run(use())
    with pytest.raises(ConfigError, match="is not where dsv3 serve takes workers"):
        asyncio.run(ends(None, handler=web))
    with pytest.raises(ConfigError, match="says nothing"):
        asyncio.run(ends(None, handler=silent))


def test_an_address_is_a_host_and_a_port():
    assert read_address("gpu-7:8100", option="--join") == Address(host="gpu-7", port=8100)
    for text in ("gpu-7", ":80", "gpu-7:", "gpu-7:x", "gpu-7:99999", "::1:80"):
        with pytest.raises(ConfigError, match=r"--join .*write HOST:PORT"):
            read_address(text, option="--join")
