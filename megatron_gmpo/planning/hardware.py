"""Figures of GPUs from their data sheets, and the efficiencies that the step estimate assumes."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One GPU of a node with eight GPUs.

    Attributes:
        memory: bytes that torch can allocate.
        flops: dense BF16 FLOPs per second.
        bandwidth: bytes per second of the GPU's memory.
        nvlink: bytes per second in one direction to GPUs of the same node.
        network: bytes per second in one direction to other nodes.
    """

    memory: int
    flops: float
    bandwidth: float
    nvlink: float
    network: float


HARDWARE = {
    "h100": Hardware(79 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Hardware(139 * GIB, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Hardware(178 * GIB, 2250e12, 7.7e12, 900e9, 50e9),
}
"""GPUs by name. Source: NVIDIA's data sheets of the H100 SXM, the H200 SXM and the HGX B200.

FLOPs are without sparsity. NVLink is halved to one direction. The network is one 400 Gb/s adapter per GPU, as
in DGX systems."""
GPUS_PER_NODE = 8

COMPUTE_EFFICIENCY = 0.45
"""Share of the peak that training reaches in matrix products and the small kernels between them."""
PREFILL_EFFICIENCY = 0.4
"""Share of the peak that servers reach in prefill."""
DECODE_EFFICIENCY = 0.6
"""Share of the memory bandwidth that decoding reaches."""
LINK_EFFICIENCY = 0.7
"""Share of link bandwidth that collectives reach. No communication overlaps with computation."""
LAYER_LATENCY_S = 60e-6
"""Minimum time of one layer in decoding: the launches of about a dozen kernels."""
TP_LATENCY_S = 20e-6
"""Time of one layer's two all-reduces in decoding, for a server with several GPUs."""
DISK_BANDWIDTH = 2e9
"""Bytes per second with which one process writes to a shared file system or reads from it."""
BUCKET_S = 0.02
"""Time of a bucket of a weight sync besides its copies: a request, and the loading of its tensors by name."""
STOP_S = 30e-6
"""Time that a rank loses when the host waits for the GPU: the copy, and the launches that follow it.

A MoE layer does so once in a forward pass: the host needs the number of tokens of each expert."""
COLUMNS_S = 0.03e-6
"""Seconds of a node for the columns of a token, from the answer to the rank (``benchmarks.data_plane``)."""
EXPERTS_S = 2.7e-9
"""Seconds of a node for a byte of a token's routed experts (``benchmarks.data_plane``)."""
RESERVED = 5 * GIB
"""Memory for the CUDA context, NCCL buffers, library workspaces and fragmentation."""
SERVER_MEMORY = 0.85
"""Share of its GPU's memory that a server takes, unless ``sglang.args.mem_fraction_static`` is set."""
