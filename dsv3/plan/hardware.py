"""What the GPUs of a cluster can do, and how fast they reach each other."""

import difflib
from dataclasses import dataclass, fields, replace

from dsv3.config.check import require_not_negative, require_positive
from dsv3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU and its links. Rates are of dense products and of one direction of a link."""

    name: str
    bf16_tflops: float
    """Peak of BF16 products with FP32 sums, 1e12 FLOPs a second; the denominator of MFU."""
    fp8_tflops: float
    """Peak of FP8 products; 0 where the GPU has none."""
    memory_gb: float
    """1e9 bytes."""
    memory_gb_s: float
    """1e9 bytes a second, between the GPU and its memory."""
    node_gb_s: float
    """1e9 bytes a second to the other GPUs of the node, as reached."""
    network_gb_s: float
    """1e9 bytes a second to other nodes for each GPU, as reached."""
    ranks_per_node: int = 8
    origin: str = ""
    """Where the numbers come from."""

    def __post_init__(self) -> None:
        require_positive(self, "bf16_tflops", "memory_gb", "memory_gb_s", "node_gb_s", "network_gb_s", "ranks_per_node")
        require_not_negative(self, "fp8_tflops")

    def link(self, *, within_node: bool) -> str:
        """Return the name of the link between two ranks."""
        return "NVLink" if within_node else "IB"

    def bytes_per_second(self, link: str) -> float:
        """Return the rate of a link, by the name that `link` gives it."""
        return 1e9 * (self.node_gb_s if link == "NVLink" else self.network_gb_s)


REACHED = 0.8
"""Of a link's nominal rate, where no measurement is published: NVLink of the H800 reaches 160 of 200 GB/s (fact sheet
3.6), and so we assume of the others."""

H800 = Hardware(
    name="h800",
    bf16_tflops=989.0,
    fp8_tflops=1979.0,
    memory_gb=85.9,
    memory_gb_s=3350.0,
    node_gb_s=160.0,
    network_gb_s=50.0,
    origin="report 3.2.2: NVLink 160 GB/s, IB 50 GB/s (DeepEP measures 50 at EP64); peaks of the H100's data sheet",
)
_SHEET = f"data sheet; links at {REACHED:.0%} of nominal, as the H800's NVLink"
GPUS = {
    gpu.name: gpu
    for gpu in (
        H800,
        replace(H800, name="h100", node_gb_s=REACHED * 450, origin=f"{_SHEET}; IB as the H800's"),
        replace(
            H800,
            name="h200",
            memory_gb=141.0,
            memory_gb_s=4800.0,
            node_gb_s=REACHED * 450,
            origin=f"{_SHEET}; IB as the H800's",
        ),
        Hardware(
            name="b200",
            bf16_tflops=2250.0,
            fp8_tflops=4500.0,
            memory_gb=180.0,
            memory_gb_s=8000.0,
            node_gb_s=REACHED * 900,
            network_gb_s=50.0,
            origin=f"{_SHEET}; one 400 Gb/s port a GPU, as the H800's",
        ),
        Hardware(
            name="a100",
            bf16_tflops=312.0,
            fp8_tflops=0.0,
            memory_gb=85.9,
            memory_gb_s=2039.0,
            node_gb_s=REACHED * 300,
            network_gb_s=25.0,
            origin=f"{_SHEET}; one 200 Gb/s port a GPU",
        ),
    )
}
CUSTOM = "custom"


def find_hardware(name: str, *, changes: dict[str, float]) -> Hardware:
    """Return a GPU by its name, some of its numbers replaced; 'custom' has none but what `changes` say.

    Raises:
        ConfigError: there is no such GPU or number, or a custom one lacks some.
    """
    known = {field.name: field.type for field in fields(Hardware) if field.name not in ("name", "origin")}
    for key in changes:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"a GPU has no number '{key}'; {hint}")
    values = {key: int(value) if key == "ranks_per_node" else value for key, value in changes.items()}
    if name == CUSTOM:
        missing = [key for key in known if key not in changes and key != "ranks_per_node"]
        if missing:
            raise ConfigError(
                f"a custom GPU needs --hardware NAME=VALUE for each of {', '.join(missing)}; or begin with one of "
                f"{', '.join(GPUS)} and change some of its numbers"
            )
        return Hardware(name=CUSTOM, origin="given on the command line", **values)  # type: ignore[arg-type]
    if name not in GPUS:
        raise ConfigError(f"there is no GPU '{name}' here; choose one of {', '.join(GPUS)} or {CUSTOM}")
    gpu = GPUS[name]
    if not values:
        return gpu
    origin = f"{gpu.origin}; given on the command line: {', '.join(values)}"
    return replace(gpu, **values, origin=origin)  # type: ignore[arg-type]
