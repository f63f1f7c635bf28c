"""A line between two machines of a deployment: both show that they know its secret, and take nothing unsigned.

Each draws a number; what they show is a signature of both numbers, and the key of all that follows is made of them, so
that nothing can be said again on another line, or out of its place on this one. What travels is not hidden: it needs a
network that is trusted to be silent, as the pages and NCCL do.
"""

import asyncio
import hashlib
import hmac
import os
import secrets
import socket
import struct
from contextlib import suppress

from dsv3.config.address import Address
from dsv3.errors import ConfigError, EngineError

GREETING = b"dsv3 workers 1\n"
NONCE_BYTES = 32
PROOF_BYTES = 32
SIGNATURE_BYTES = 16
LARGEST_MESSAGE = 256 * 2**20
MOST_UNSENT = 1 << 30
"""Bytes that may wait for a peer that does not read, before the line is given up."""
_HEAD = struct.Struct(f"!I{SIGNATURE_BYTES}s")


class LineEndedError(EngineError):
    """The other end has gone, or what came is not its word."""


class Line:
    """One end. `send` never waits; `receive` waits for the next message."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, key: bytes, is_caller: bool
    ) -> None:
        self.peer: str = writer.get_extra_info("peername")[0]
        self.own_host: str = writer.get_extra_info("sockname")[0]
        """This machine's address, as the network between the two has it."""
        self._reader, self._writer = reader, writer
        ways = [b"from the caller", b"from the called"]
        self._out = _Signer(key, way=ways[not is_caller])
        self._in = _Signer(key, way=ways[is_caller])

    def send(self, message: bytes) -> None:
        """Say something; it is lost if the other end has gone."""
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > MOST_UNSENT:
            self.abort()
            return
        self._writer.write(_HEAD.pack(len(message), self._out.sign(message)) + message)

    async def receive(self) -> bytes:
        """Return the next message.

        Raises:
            LineEndedError: there is none to come, or it is not signed as it should be.
        """
        try:
            length, signature = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
            if length > LARGEST_MESSAGE:
                raise LineEndedError(f"{self.peer} says a message has {length} bytes")
            message = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise LineEndedError(f"the line to {self.peer} has ended") from error
        if not hmac.compare_digest(signature, self._in.sign(message)):
            raise LineEndedError(f"a message from {self.peer} does not have its signature")
        return message

    def close(self) -> None:
        """End the line, after what was sent."""
        self._writer.close()

    def abort(self) -> None:
        """End the line at once."""
        self._writer.transport.abort()

    async def closed(self, *, seconds: float) -> None:
        """End the line, and wait until what was sent has gone, at most so long."""
        self.close()
        with suppress(TimeoutError, OSError):
            await asyncio.wait_for(self._writer.wait_closed(), seconds)


class _Signer:
    """Signs messages of one direction, each with its place in the line."""

    def __init__(self, key: bytes, *, way: bytes) -> None:
        self._key = hashlib.sha256(key + way).digest()
        self._count = 0

    def sign(self, message: bytes) -> bytes:
        self._count += 1
        signed = hashlib.blake2b(self._count.to_bytes(8, "big"), key=self._key, digest_size=SIGNATURE_BYTES)
        signed.update(message)
        return signed.digest()


async def call(address: Address, *, secret: str, seconds: float) -> Line:
    """Return a line to whoever listens at an address.

    Raises:
        ConfigError: nobody does, or somebody else, or one with another secret.
    """
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(address.host, address.port), seconds)
    except (OSError, TimeoutError) as error:
        why = f"no answer within {seconds:g} seconds" if isinstance(error, TimeoutError) else _words(error)
        raise ConfigError(
            f"cannot reach {address}: {why}; is dsv3 serve --workers-at running there, on an address that others reach?"
        ) from error
    try:
        return await asyncio.wait_for(_call(reader, writer, address=address, secret=secret), seconds)
    except TimeoutError as error:
        writer.close()
        raise ConfigError(
            f"whoever listens at {address} says nothing; is it where dsv3 serve takes workers?"
        ) from error
    except BaseException:
        await _hang_up(writer)
        raise


async def _call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, address: Address, secret: str) -> Line:
    try:
        greeting = await reader.readexactly(len(GREETING))
        if greeting != GREETING:
            raise ConfigError(f"what listens at {address} is not where dsv3 serve takes workers, or of another version")
        numbers = await reader.readexactly(NONCE_BYTES)
        mine = secrets.token_bytes(NONCE_BYTES)
        writer.write(mine + _sign(secret, b"caller", numbers + mine))
        proof = await reader.readexactly(PROOF_BYTES)
    except (asyncio.IncompleteReadError, OSError) as error:
        raise ConfigError(
            f"the server at {address} has hung up: it has another secret; give both the same --secret-file"
        ) from error
    numbers += mine
    if not hmac.compare_digest(proof, _sign(secret, b"called", numbers)):
        raise ConfigError(f"the server at {address} does not know the secret; give both the same --secret-file")
    return Line(reader, writer, key=_sign(secret, b"key", numbers), is_caller=True)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, secret: str, seconds: float) -> Line:
    """Return a line to whoever has called.

    Raises:
        LineEndedError: the caller does not show within the time that it knows the secret.
    """
    mine = secrets.token_bytes(NONCE_BYTES)
    writer.write(GREETING + mine)
    try:
        said = await asyncio.wait_for(reader.readexactly(NONCE_BYTES + PROOF_BYTES), seconds)
    except (asyncio.IncompleteReadError, OSError, TimeoutError) as error:
        await _hang_up(writer)
        raise LineEndedError("whoever called did not go on") from error
    numbers, proof = mine + said[:NONCE_BYTES], said[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _sign(secret, b"caller", numbers)):
        await _hang_up(writer)
        raise LineEndedError("whoever called has another secret")
    writer.write(_sign(secret, b"called", numbers))
    return Line(reader, writer, key=_sign(secret, b"key", numbers), is_caller=False)


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


def _sign(secret: str, role: bytes, numbers: bytes) -> bytes:
    return hmac.digest(secret.encode(), role + numbers, "sha256")


def _words(error: OSError) -> str:
    if error.errno and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno).lower()  # asyncio puts words of its own in the place of these
    return (error.strerror or str(error)).lower()
