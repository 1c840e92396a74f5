"""Which launch configuration is taken, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from fused_rlhf.kernels import tiles

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def no_cache() -> Iterator[None]:
    tiles.arch.cache_clear()
    yield
    tiles.arch.cache_clear()


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
        ((13, 0), "sm_120"),
    ],
)
def test_architecture_of_an_nvidia_device(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert tiles.arch(CUDA) == name


@pytest.mark.parametrize(("gcn", "name"), [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx90a", "gfx942")])
def test_architecture_of_an_amd_device(gcn: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Properties", (), {"gcnArchName": gcn}))
    assert tiles.arch(CUDA) == name


def test_a_device_without_kernels_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r'CUDA or HIP device, got cpu; use backend="chunked"'):
        tiles.arch(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(RuntimeError, match=r'8\.0 or newer, got 7\.5; use backend="chunked"'):
        tiles.arch(CUDA)
    tiles.arch.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: type("Properties", (), {"gcnArchName": "gfx1100"})
    )
    with pytest.raises(RuntimeError, match=r'got gfx1100; use backend="chunked"'):
        tiles.arch(CUDA)


def test_fp32_follows_torchs_setting() -> None:
    setting = torch.backends.cuda.matmul
    usual = setting.fp32_precision
    try:
        for value in ("ieee", "tf32"):
            setting.fp32_precision = value
            assert tiles.precision(torch.float32) == value
    finally:
        setting.fp32_precision = usual
    assert tiles.precision(torch.bfloat16) == "half"


def test_unaligned_operands_take_a_record_without_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "arch", lambda _: "sm_90")
    assert tiles.lookup("stats", CUDA, torch.bfloat16, aligned=True).tma
    assert not tiles.lookup("stats", CUDA, torch.bfloat16, aligned=False).tma


def test_tf32_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "arch", lambda _: "gfx942")
    monkeypatch.setattr(tiles, "precision", lambda _: "tf32")
    with pytest.raises(RuntimeError, match=r'no tf32 products on gfx942; use backend="chunked"'):
        tiles.lookup("stats", CUDA, torch.float32, aligned=True)


def test_every_record_fits_blocks_of_256_columns() -> None:
    assert all(
        256 % tile.block_v == 0 and tile.block_v % tile.slices == 0 for tile in (*tiles.TILES.values(), tiles.RAW)
    )


def test_statistics_never_take_their_products_from_cublas() -> None:
    """It adds in an order that depends on the number of rows: a ratio of old and new log-probs would not be 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "arch", lambda _: "sm_90")
        for kernel in tiles.KERNELS:
            found = tiles.candidates(kernel, CUDA, torch.bfloat16, aligned=True)
            assert (tiles.RAW in found) == kernel.startswith("dlogits")


def test_sums_that_are_cut_earlier_are_corrected_by_more_tokens() -> None:
    exact = {
        arch: tile.exact for (kernel, arch, how), tile in tiles.TILES.items() if (kernel, how) == ("stats", "half")
    }
    assert min(exact[arch] for arch in ("sm_80", "sm_86", "sm_89", "sm_120")) > exact["sm_90"] == exact["sm_100"] == 4


def test_autotuning_times_each_candidate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "arch", lambda _: "sm_90")
    monkeypatch.setattr(tiles, "_tuned", {})
    launched: list[tiles.Tile] = []
    times = iter([3.0, 2.0, 1.0, 2.5, 4.0, 5.0, 6.0])

    def bench(run, **_):  # type: ignore[no-untyped-def]
        run()
        return next(times)

    monkeypatch.setattr(tiles.triton.testing, "do_bench", bench)
    arguments = ("stats", CUDA, torch.bfloat16, True, "H", launched.append)
    first = tiles.candidates(*arguments[:4])
    assert tiles.tune(*arguments) == first[0]
    assert launched == []
    monkeypatch.setenv("FUSED_RLHF_AUTOTUNE", "1")
    assert tiles.tune(*arguments) == first[2]
    assert launched == first
    assert tiles.tune(*arguments) == first[2]
    assert launched == first
