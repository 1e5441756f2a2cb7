"""What the two exchanges of docs/distributed.md cost a rank: ``python benchmarks/exchange.py``.

W ranks hold N rows each, of D features in b bytes; sums and gradients under way have a bytes. A
gather passes W - 1 pieces on; the sum over ranks of a tensor sends it 2 (W - 1) / W times, as the
usual algorithm does.
"""

from typing import NamedTuple

RANKS = (2, 4, 64, 512, 4096)


class Machine(NamedTuple):
    """Assumed, not measured: of a GPU in a cluster."""

    bytes_per_second: float = 50e9  # that a rank sends
    operations_per_second: float = 400e12
    seconds_per_hop: float = 40e-6  # to start a transfer and the kernels of a block


class Keys(NamedTuple):
    """What a loss has others' queries meet, in rows of a rank."""

    gathered: int  # tensors [N, D] that a gather moves
    in_ring: int  # and a ring
    key_numbers: int  # that go back along with a row of keys
    column_sums: bool  # whether queries give keys a log-sum-exp
    one_trip: bool  # whether gradients come home in the forward pass


LOSSES = {
    "nt_xent": Keys(2, 2, 1, False, False),
    "info_nce": Keys(1, 1, 1, False, False),
    "clip": Keys(2, 1, 3, True, False),
    "siglip": Keys(1, 1, 0, False, True),
}


def bytes_sent(loss: str, exchange: str, W: int, N: int, D: int, b: int, a: int) -> int:
    """By a rank, in the forward and the backward pass, but for the sizes: 24 (W - 1) bytes."""
    keys = LOSSES[loss]
    if exchange == "gather":
        piece = keys.gathered * N * D * b
        return (W - 1) * piece + 2 * (W - 1) * piece
    rows = keys.in_ring * N
    trips = 1 if keys.one_trip else 2
    there = trips * rows * D * b + rows * keys.key_numbers * a
    home = rows * D * a + (2 * rows * a if keys.column_sums else 0)
    return (W - 1) * there + W * home


def bytes_held(loss: str, exchange: str, W: int, N: int, D: int, b: int, a: int) -> int:
    """Of others' rows and their gradients, at a time, as the code names them."""
    keys = LOSSES[loss]
    if exchange == "gather":  # in the backward pass keys, their gradients, and the sum of these
        return 3 * W * keys.gathered * N * D * b
    # A block, the next, what the backend finds for it; sums of gradients here, arriving, leaving.
    return (3 * b + 3 * a) * keys.in_ring * N * D


def operations(loss: str, W: int, N: int, D: int) -> int:
    """Of the products, which are the same for either exchange: forward and backward."""
    rows = 2 * N if loss == "nt_xent" else N
    # Scores, scores again, and the gradients of queries and keys; scores once in a single trip.
    products = {"siglip": 3, "clip": 8}.get(loss, 4)
    return products * 2 * rows * W * rows * D


def seconds(loss: str, exchange: str, W: int, N: int, D: int, b: int, machine: Machine) -> float:
    """A gather is waited for; in a ring the longer of transfer and work hides the other."""
    transfer = bytes_sent(loss, exchange, W, N, D, b, 4) / machine.bytes_per_second
    work = operations(loss, W, N, D) / machine.operations_per_second
    if exchange == "gather":
        return transfer + work
    trips = 1 if LOSSES[loss].one_trip else 2
    return max(transfer, work) + trips * W * machine.seconds_per_hop


def even_batch(loss: str, W: int, D: int, b: int, machine: Machine) -> int:
    """The least power of two of rows per rank from which on the ring takes less time."""
    sizes = [2**power for power in range(24)]
    slow = [
        N
        for N in sizes
        if seconds(loss, "ring", W, N, D, b, machine)
        >= seconds(loss, "gather", W, N, D, b, machine)
    ]
    return 2 * max(slow, default=0) or 1


def tables(N: int = 1024, D: int = 512, b: int = 2) -> str:
    """Markdown: bytes and operations of a rank, and where the ring is the faster."""
    mib, machine = 2**20, Machine()
    lines = [
        "| loss | ranks | gather sends | ring sends | gather holds | ring holds | operations "
        "| ring is faster from |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for loss in LOSSES:
        for W in RANKS:
            sent = [bytes_sent(loss, way, W, N, D, b, 4) / mib for way in ("gather", "ring")]
            held = [bytes_held(loss, way, W, N, D, b, 4) / mib for way in ("gather", "ring")]
            work = operations(loss, W, N, D)
            lines.append(
                f"| {loss} | {W} | "
                + " | ".join(f"{each:,.0f} MiB" for each in (*sent, *held))
                + f" | {work:.2e} | N = {even_batch(loss, W, D, b, machine):,} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
