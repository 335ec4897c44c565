"""Laws are kept from one session to the next, and whatever happened to their files, forecasts stay the same."""

import pytest
import torch

from gclib import ContrastiveLoss, forecast_step
from gclib.memory.fake_steps import _made, fake_step
from gclib.memory.workload import Workload

SAME = {"config": "tiny", "batch_size": 9, "query_length": 8, "passage_length": 12}
CASES = [("naive", {}), ("grad_cache", {"chunk_size": 4, "retain_chunks": 1})]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache, and no law in memory."""
    monkeypatch.setenv("GCLIB_CACHE", str(tmp_path))
    _made.cache_clear()
    yield tmp_path / "laws"
    _made.cache_clear()


def runs(loss=None):
    return fake_step(Workload(step="naive", loss=loss, **SAME)).runs


def told(step, options):
    forecast = forecast_step(step, **SAME, **options)
    return forecast.peak_bytes, forecast.at_peak(), forecast.exact_law


@pytest.mark.slow
@pytest.mark.parametrize(("step", "options"), CASES)
def test_a_later_session_runs_nothing(step, options):
    fresh, needed = told(step, options), runs()
    assert needed > 0
    _made.cache_clear()
    assert told(step, options) == fresh
    assert runs() == 0


DEEP, NO_BYTES, NO_ARRAYS = pytest.mark.deep, lambda b: b"", lambda b: b"{}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-9],
        lambda b: b.replace(b"PK", b"KP"),
        *(pytest.param(d, marks=DEEP) for d in (NO_BYTES, NO_ARRAYS)),
    ],
)
def test_a_damaged_file_is_built_again(folder, damage):
    fresh = told(*CASES[1])
    paths = sorted(folder.glob("*.law"))
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(damage(path.read_bytes()))
    _made.cache_clear()
    assert told(*CASES[1]) == fresh and runs() > 0
    assert [path.read_bytes() for path in paths] == whole
    assert not list(folder.glob("*.part"))


@pytest.mark.slow
def test_other_options_have_other_files(folder):
    told(*CASES[1])
    count = len(list(folder.glob("*.law")))
    for options in ({"dtype": torch.bfloat16}, {"autocast": torch.bfloat16}, {"gradient_checkpointing": True}):
        forecast_step("grad_cache", **SAME, **CASES[1][1], **options)
        assert len(list(folder.glob("*.law"))) > count
        count = len(list(folder.glob("*.law")))


@pytest.mark.slow
def test_a_loss_that_no_text_describes_is_not_kept(folder):
    forecast_step("naive", **SAME, loss=lambda q, p: ContrastiveLoss()(q, p))
    assert not list(folder.glob("*.law"))


@pytest.mark.slow
def test_where_nothing_can_be_written_forecasts_go_on(folder, monkeypatch):
    fresh = told(*CASES[0])
    _made.cache_clear()
    folder.parent.joinpath("file").write_text("in the way", "utf-8")
    monkeypatch.setenv("GCLIB_CACHE", str(folder.parent / "file"))
    assert told(*CASES[0]) == fresh
