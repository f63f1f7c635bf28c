"""Where a process listens, as it is written on the command line."""

from dataclasses import dataclass

from dsv3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Address:
    """A host, by name or IPv4 number, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def read_address(text: str, *, option: str) -> Address:
    """Return what HOST:PORT says; `option` is where it was written.

    Raises:
        ConfigError: it is not of that form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or ":" in host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{option} {text!r}: write HOST:PORT, as 10.0.0.5:8100 (IPv4, or a name)")
    return Address(host=host, port=int(port))
