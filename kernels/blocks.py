"""How large the pieces of a call are, and what it therefore takes: arithmetic over sizes alone.

Scratch is bounded in bytes, whatever the model. N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from fused_rlhf.kernels.interface import Work

ROWS = 8192  # of one launch
COLUMNS_PER_SM = 64  # of the smallest vocabulary block: with ROWS rows its tiles make whole waves over the device
BLOCK_BYTES = 280_000_000  # two_phase: dlogits of a vocabulary block, and again for its dW in fp32
SPLIT_BYTES = 16 << 20  # one_pass: the fp32 product of the columns of dW that are summed at a time; it stays in L2
ONE_PASS_SHARE = 32  # one_pass: of the device's memory, one part in so many is for E and the low halves of dW
ONE_PASS_ROWS = 1024  # one_pass: rows of a block at least
DIVERGENCE_BYTES = 1 << 30  # divergence: both heads' products for some rows; back for some columns, and their dz and dW
TRUNCATION_BYTES = 512 << 20  # truncation: the products of some rows

# H200: a product of N=8192, H=4096, V=151936 took 14.7 ms (12.5 ms at higher clocks); bytes by its data sheet.
PRODUCTS_PER_S = 694e12  # floating-point operations of a product in half precision
BYTES_PER_S = 4.8e12


def _ceil(count: int, step: int) -> int:
    return -(-count // step) * step


def padded(columns: int) -> int:
    return _ceil(columns, 64)  # whole 128-byte lines, as descriptors and cuBLAS like them


def unit_columns(multiprocessors: int) -> int:
    """Of the smallest vocabulary block; every tile's width divides it."""
    return _ceil(COLUMNS_PER_SM * multiprocessors, 256)


def gradient_columns(unit: int, rows: int, hidden_size: int, itemsize: int) -> int:
    """Of a vocabulary block of two_phase, in whole units: the fewer the rows, the fewer the blocks."""
    fits = BLOCK_BYTES // max(min(rows, ROWS) * itemsize, 4 * hidden_size)
    return max(fits // unit, 1) * unit


def split_columns(hidden_size: int) -> int:
    """Columns of dW that one_pass sums at a time."""
    return max(SPLIT_BYTES // (4 * hidden_size) // 256, 1) * 256


def one_pass_rows(rows: int, vocabulary: int, hidden_size: int, itemsize: int, low_halves: bool, device: int) -> int:
    """Rows that one_pass takes at a time: all, or what its share of the device's bytes leaves beside the low halves of dW."""
    share, per_row = device // ONE_PASS_SHARE, padded(vocabulary) * itemsize
    if rows * per_row <= share:
        return rows
    low = vocabulary * hidden_size * itemsize if low_halves else 0
    fits = (share - low) // per_row // ONE_PASS_ROWS * ONE_PASS_ROWS
    return min(rows, max(ONE_PASS_ROWS, fits))


def divergence_rows(rows: int, vocabulary: int) -> int:
    """Rows whose products with both heads, in fp32, are held at a time."""
    return max(1, min(rows, DIVERGENCE_BYTES // (8 * padded(vocabulary) * 16) * 16))


def truncation_rows(rows: int, vocabulary: int) -> int:
    """Rows whose products, in fp32, are held at a time."""
    return max(1, min(rows, TRUNCATION_BYTES // (4 * padded(vocabulary) * 16) * 16))


def _divergence_bytes(rows: int, hidden_size: int, itemsize: int) -> int:
    """Of one column of its backward: both products, dz (which takes the place of a product where it is fp32) and dW."""
    return min(rows, ROWS) * (8 + (itemsize if itemsize < 4 else 0)) + 4 * hidden_size


def divergence_columns(rows: int, vocabulary: int, hidden_size: int, itemsize: int) -> int:
    """Columns of a vocabulary block of its backward."""
    per_column = _divergence_bytes(rows, hidden_size, itemsize)
    return min(vocabulary, max(256, DIVERGENCE_BYTES // (per_column * 256) * 256))


def _halves(work: Work) -> bool:
    return work.needs.weight and work.dtype.itemsize == 2


def _one_pass_rows(work: Work) -> int:
    sizes = work.rows, work.vocabulary, work.hidden_size, work.dtype.itemsize
    return one_pass_rows(*sizes, _halves(work), work.device_bytes)


def memory(work: Work) -> float:
    """Statistics per tile, then dlogits of a block of columns and dX in fp32, or, in one pass, exponentials of a block of
    rows and the low halves of a sum of dW over several blocks. A divergence: products of both heads for a block."""
    N, H, V, itemsize = work.rows, work.hidden_size, work.vocabulary, work.dtype.itemsize
    if work.route == "divergence":
        forward = 8.0 * divergence_rows(N, V) * padded(V)
        block = divergence_columns(N, V, H, itemsize) * _divergence_bytes(N, H, itemsize)
        return 64 * N + max(forward, block + 4 * N * H + work.gradients if any(work.needs) else 0)
    rows, tiles = min(N, ROWS), -(-V // 128)
    of_tiles = 12.0 * rows * tiles
    if work.route == "forward":
        return of_tiles + 64 * N
    if work.route == "one_pass" and not work.needs_entropy:
        block = _one_pass_rows(work)
        low = V * H * itemsize if _halves(work) and block < N else 0
        return block * (V * itemsize + 8 * H + 12 * tiles) + low + work.gradients
    columns = min(gradient_columns(unit_columns(work.multiprocessors), N, H, itemsize), V)
    return max(of_tiles, rows * columns * itemsize + 4 * columns * H) + 4 * N * H + work.gradients


def one_pass_is_faster(work: Work) -> bool:
    """Whether one_pass is predicted to take less time than two_phase: products and bytes of scratch, counted.

    One product fewer; but with several blocks of rows the two halves of dW are read and written for each of them.
    """
    N, H, V, itemsize = work.rows, work.hidden_size, work.vocabulary, work.dtype.itemsize
    product = 2.0 * N * H * V / PRODUCTS_PER_S
    blocks = -(-N // _one_pass_rows(work)) if _halves(work) else 1
    of_halves = 4.0 * itemsize * V * H * blocks if blocks > 1 else 0.0
    columns = gradient_columns(unit_columns(work.multiprocessors), N, H, itemsize)
    of_dx = 8.0 * N * H * -(-V // columns) if work.needs.hidden else 0.0
    return of_halves / BYTES_PER_S <= product + of_dx / BYTES_PER_S
