"""How a call is cut by bytes, and which of two ways is predicted to be the faster."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_rlhf.kernels import blocks
from fused_rlhf.kernels.interface import Needs, Work

H200 = {"multiprocessors": 132, "device_bytes": 141 << 30}
SHAPES = [(896, 151936), (2048, 128256), (4096, 151936), (5376, 262144), (8192, 128256)]


def work(route: str, N: int, H: int, V: int, **sizes: int) -> Work:
    return Work(route, N, H, V, torch.bfloat16, Needs(True, True, False), **(H200 | sizes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("H", "V"), SHAPES)
@pytest.mark.parametrize("N", [1, 64, 256, 8192, 131072])
def test_blocks_of_two_phase_are_whole_units_within_their_bytes(N: int, H: int, V: int) -> None:
    unit = blocks.unit_columns(132)
    columns = blocks.gradient_columns(unit, N, H, 2)
    assert columns % unit == 0
    assert unit % 256 == 0  # every tile's width divides it
    fits = max(min(N, blocks.ROWS) * columns * 2, 4 * H * columns) <= blocks.BLOCK_BYTES
    assert fits or columns == unit


def test_fewer_rows_take_fewer_blocks() -> None:
    unit = blocks.unit_columns(132)
    counts = [-(-151936 // blocks.gradient_columns(unit, N, 896, 2)) for N in (64, 512, 8192)]
    assert counts == sorted(counts)
    assert counts[0] <= 2  # 18 where a block is one unit


@pytest.mark.parametrize(("H", "V"), SHAPES)
def test_a_product_of_dw_fits_its_bytes_and_fills_a_device(H: int, V: int) -> None:
    columns = blocks.split_columns(H)
    assert columns % 256 == 0
    assert 4 * H * columns <= blocks.SPLIT_BYTES
    assert columns * H >= 0.9 * blocks.SPLIT_BYTES / 4 - 256 * H
    assert columns * H >= 120 * 128 * 256  # tiles of a product for 120 multiprocessors, whatever H is


@pytest.mark.parametrize(("H", "V"), SHAPES)
@pytest.mark.parametrize("device", [24 << 30, 80 << 30, 141 << 30])
def test_one_pass_takes_its_share_of_the_device_or_the_fewest_rows(device: int, H: int, V: int) -> None:
    rows = blocks.one_pass_rows(131072, V, H, 2, True, device)
    scratch = rows * blocks.padded(V) * 2 + V * H * 2
    assert scratch <= device // blocks.ONE_PASS_SHARE or rows == blocks.ONE_PASS_ROWS
    assert rows % blocks.ONE_PASS_ROWS == 0
    assert blocks.one_pass_rows(131072, V, H, 2, True, 2 * device) >= rows
    assert blocks.one_pass_rows(8, V, H, 2, True, device) == 8


@pytest.mark.parametrize(("H", "V"), SHAPES)
def test_memory_has_a_bound_in_the_tokens(H: int, V: int) -> None:
    """Beyond the gradients: dX in fp32, and a few numbers a token."""
    for route in ("two_phase", "one_pass", "forward"):
        few, many = (work(route, N, H, V) for N in (1 << 17, 1 << 20))
        extra = [blocks.memory(w) - w.gradients for w in (few, many)]
        per_token = (extra[1] - extra[0]) / ((1 << 20) - (1 << 17))
        assert per_token <= {"two_phase": 4 * H, "one_pass": 0, "forward": 64}[route]


def test_one_pass_pays_where_its_blocks_are_not_small_against_the_halves_of_dw() -> None:
    assert blocks.one_pass_is_faster(work("one_pass", 8192, 4096, 151936))  # one block of rows: a product fewer
    assert blocks.one_pass_is_faster(work("one_pass", 131072, 4096, 151936))
    small = work("one_pass", 131072, 5376, 262144, device_bytes=1 << 30)
    assert blocks.one_pass_is_faster(small)  # blocks of 1024 rows still cost less than a product
    frozen = replace(small, needs=Needs(True, False, False))
    assert blocks.one_pass_is_faster(frozen)


def test_two_phase_is_taken_where_the_halves_cost_more_than_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    small = work("one_pass", 131072, 5376, 262144, device_bytes=1 << 30)
    monkeypatch.setattr(blocks, "ONE_PASS_ROWS", 256)
    assert not blocks.one_pass_is_faster(small)
    assert blocks.one_pass_is_faster(replace(small, needs=Needs(True, False, False)))  # no dW, no halves
