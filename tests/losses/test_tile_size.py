"""The rule for tiles: what it promises at any cache and width, and what it reads of this machine."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gclib.losses import tiled
from gclib.losses.module import ContrastiveLoss
from gclib.losses.tiled import LARGEST_TILE, SMALLEST_TILE, auto_tile_size, last_level_cache_bytes


@given(st.integers(1, 8192), st.integers(2**16, 2**30), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_the_tile_is_the_largest_power_of_two_that_works_in_half_the_cache(dimensions, cache_bytes, dtype):
    side = auto_tile_size(dimensions, dtype=dtype, cache_bytes=cache_bytes)
    itemsize = 8 if dtype == torch.float64 else 4

    def bytes_of(side):
        return itemsize * (2 * side * side + 2 * side * dimensions)

    assert side.bit_count() == 1 and SMALLEST_TILE <= side <= LARGEST_TILE
    assert side == SMALLEST_TILE or bytes_of(side) <= cache_bytes / 2
    assert side == LARGEST_TILE or bytes_of(2 * side) > cache_bytes / 2


def test_the_cache_is_read_from_the_system_and_guessed_where_it_says_nothing(tmp_path, monkeypatch):
    last_level_cache_bytes.cache_clear()
    for name, text in (("index0", "32K"), ("index2", "1024K\n"), ("index3", "36M"), ("index4", "?")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(text)
    monkeypatch.setattr(tiled, "CACHE_FOLDER", tmp_path)
    assert last_level_cache_bytes() == 36 * 2**20
    last_level_cache_bytes.cache_clear()
    monkeypatch.setattr(tiled, "CACHE_FOLDER", tmp_path / "none")
    assert last_level_cache_bytes() == tiled.UNKNOWN_CACHE_BYTES
    last_level_cache_bytes.cache_clear()


def test_a_loss_with_tiles_by_rule_is_the_dense_loss():
    queries, passages = torch.randn(300, 8), torch.randn(300, 8)
    torch.testing.assert_close(
        ContrastiveLoss(tile_size="auto")(queries, passages), ContrastiveLoss()(queries, passages)
    )


@pytest.mark.parametrize("arguments", [{"dimensions": 0}, {"dimensions": 8, "cache_bytes": -1}])
def test_bad_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match="must be an int of at least 1"):
        auto_tile_size(**arguments)
