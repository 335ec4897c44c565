"""The table of knobs is whole, and says what the installed libraries call them."""

import inspect

import pytest

from gclib.course.wild.knobs import KNOBS, LIBRARIES, knob_table


def test_every_row_has_a_place_for_every_library():
    assert all(len(places) == len(LIBRARIES) for places in KNOBS.values())
    lines = knob_table().splitlines()
    assert len(lines) == 2 + len(KNOBS) and {line.count("|") for line in lines} == {len(LIBRARIES) + 2}


@pytest.mark.slow
def test_the_installed_libraries_know_the_names():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pytest.importorskip("gradcache")
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    from gclib.course.wild.rivals import missing_packages, official_grad_cache

    assert missing_packages() == [] and sentence_transformers.__version__
    known = set(inspect.signature(CachedMultipleNegativesRankingLoss).parameters)
    assert {"mini_batch_size", "mini_batch_num_tokens", "scale", "gather_across_devices"} <= known
    assert "chunk_sizes" in inspect.signature(official_grad_cache()).parameters
