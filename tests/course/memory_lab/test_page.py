"""The page's modules, run by node: what they say of a step is what Python says, event by event, to the byte."""

import json
import random
import re
import subprocess
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from helpers.node import ask_page, node

from gclib.course import plots
from gclib.course.memory_lab import answers as lab
from gclib.course.memory_lab import bundles
from gclib.course.memory_lab.answers import LabSettings, forecast_of
from gclib.course.memory_lab.bundles import bundle_of, explicit_bundle, folded, page_settings, write_bundles
from gclib.course.memory_lab.picture import PAGE, page_module
from gclib.memory.ledger import KINDS
from gclib.memory.timeline import is_heading, picture_of
from gclib.support.words import format_bytes

TINY = {"model": "tiny", "length": 16}
BF16 = {"precision": "bf16 autocast"}
SHORT_QUERIES = {"model": "tiny", "length": 32, "query_length": 8, "negatives": 2, "symmetric": True, **BF16}
FEW_CONFIGURATIONS = [TINY, {**SHORT_QUERIES, "device": "cuda", "tied": False}, {**TINY, "lora_rank": 8}]
MANY_CONFIGURATIONS = [
    *FEW_CONFIGURATIONS,
    SHORT_QUERIES,
    {**TINY, **BF16, "device": "cuda", "tied": False},
    {"model": "mini", "length": 64, "precision": "pure bf16", "device": "cuda", "negatives": 1, "checkpointing": True},
    {"model": "mini", "length": 128, "query_length": 16, "tied": False, "negatives": 7, "symmetric": True},
    {"model": "small", "length": 32, "precision": "bf16 autocast"},
    {"model": "minilm-l6", "length": 64},
    {"model": "mini", "length": 32, "lora_rank": 16, "precision": "pure bf16", "device": "cuda", "checkpointing": True},
    {"model": "clip-vit-b-32-text", "length": 32, "device": "cuda"},
]
MODULES = sorted(PAGE.glob("*.js"))


def drawn(draw, configurations):
    """Which configuration, and settings of it."""
    which = draw.randrange(len(configurations))
    values = {
        "step": draw.choice(list(lab.STEP_WORDS)),
        "batch_size": draw.choice([draw.randint(1, 300), draw.choice(lab.BATCHES)]),
        "chunk_size": draw.choice([draw.randint(1, 40), draw.choice(lab.CHUNKS)]),
        "retain_chunks": draw.choice([0, 0, draw.randint(1, 70)]),
        "optimizer": draw.choice(["adamw", "sgd"]),
    }
    return which, LabSettings(**configurations[which], **values)


@pytest.mark.parametrize(
    ("count", "configurations"),
    [(200, FEW_CONFIGURATIONS), pytest.param(2_000, MANY_CONFIGURATIONS, marks=pytest.mark.deep)],
)
def test_every_event_of_drawn_settings_is_pythons_to_the_byte(count, configurations, tmp_path):
    draw = random.Random(count)
    cases = [drawn(draw, configurations) for _ in range(count)]
    asked = [[which, page_settings(settings)] for which, settings in cases]
    said, numbers, _ = ask_page(tmp_path, [bundle_of(LabSettings(**each)) for each in configurations], asked)
    at = events = 0
    for (_, settings), answer in zip(cases, said, strict=True):
        for segment, head in zip(forecast_of(settings).timeline, answer["heads"], strict=True):
            place = [segment.phase, segment.tower, segment.chunk, segment.rows, segment.repeats]
            assert head == [*place, segment.kind_bytes.size], settings
            expected = np.concatenate([segment.kind_bytes.ravel(), segment.net_bytes])
            assert np.array_equal(numbers[at : at + len(expected)], expected), settings
            at, events = at + len(expected), events + len(segment.kind_bytes)
    assert at == len(numbers) and events > 100 * count


STEPS = [
    LabSettings("naive", **TINY, batch_size=12),
    LabSettings("accumulation", **TINY, batch_size=37, chunk_size=4),
    LabSettings("accumulation", **TINY, batch_size=5, chunk_size=4),
    LabSettings(**TINY, batch_size=64, chunk_size=4),
    LabSettings(**TINY, batch_size=1_000, chunk_size=3, retain_chunks=5, optimizer="sgd"),
    LabSettings(**TINY, batch_size=2, chunk_size=1),
]
EXPLICIT = [  # their own timelines: no law holds for tiles, and a page knows none of ranks
    LabSettings(**TINY, batch_size=64, chunk_size=8, tile_size=16),
    LabSettings(**TINY, batch_size=2, chunk_size=2, ranks="2 DDP"),
    LabSettings("accumulation", **TINY, batch_size=9, chunk_size=4, ranks="4 DDP"),
    LabSettings("naive", **TINY, batch_size=12, lora_rank=8, ranks="8 FSDP2"),
]


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """(settings, the page's picture of them)."""
    known = [bundle_of(LabSettings(**TINY)), *(explicit_bundle(one, forecast_of(one)) for one in EXPLICIT)]
    budgets = [{"bytes": 2**size, "name": "the budget"} for size in (22, 40, 23, 22, 30, 24, 22, 22, 23, 24)]
    which, every = [0] * len(STEPS) + [1, 2, 3, 4], [*STEPS, *EXPLICIT]
    cases = [[w, page_settings(s), b] for w, s, b in zip(which, every, budgets, strict=True)]
    said, _, _ = ask_page(tmp_path_factory.mktemp("page"), known, cases, looks=True)
    return [(*each, answer["look"]) for *each, answer in zip(every, budgets, said, strict=True)]


def test_the_pages_picture_is_pythons_panel_by_panel(looked):
    for settings, budget, look in looked:
        picture = picture_of(forecast_of(settings).timeline)
        for panel, seen in zip(picture.panels, look["panels"], strict=True):
            assert [panel.start, panel.stop] == pytest.approx([seen["start"], seen["stop"]], abs=1e-12)
            assert panel.kind_bytes.sum(axis=1).tolist() == seen["totals"], settings
            assert [panel.pieces.start, len(panel.pieces)] == seen["pieces"] and panel.between == seen["between"]
        assert [span.label for span in picture.spans] == [label for label, *_ in look["spans"]]
        assert look["peak"][0] == look["peak"][2] == picture.peak_bytes
        assert look["peak"][1] == pytest.approx(picture.peak_x, abs=1e-12)
        words = plots.describe_timeline(picture, card_bytes=budget["bytes"], card_name=budget["name"])
        assert look["words"] == words


def expanded(settings):
    """The total of every event of the step in the order in which it goes through them, chunk after chunk."""
    pieces = [one for one in forecast_of(settings).timeline if not is_heading(one.phase, one.tower, one.chunk)]
    chunk_by_chunk = settings.step == "accumulation"
    for _, group in groupby(pieces, key=lambda one: (one.chunk, one.repeats, one.rows) if chunk_by_chunk else id(one)):
        members = list(group)
        for repeat in range(members[0].repeats):
            for one in members:
                yield from (one.kind_bytes + repeat * one.net_bytes).sum(axis=1).tolist()


def test_the_cursor_reads_every_event_of_the_step_in_order(looked):
    for settings, _, look in looked:
        assert look["totals"] == list(expanded(settings)), settings


def test_what_came_and_went_adds_up_and_the_mouse_finds_every_event(looked):
    for settings, _, look in looked:
        assert look["moved"]
        thinned = max(len(panel["totals"]) for panel in look["panels"])
        assert max(look["there"]) == 0 or settings.batch_size > thinned, settings


def test_bytes_are_written_as_in_python(tmp_path):
    draw = random.Random(5)
    numbers = [
        0,
        1,
        1023,
        1024,
        1536,
        2**20,
        1023 * 2**20,
        *(draw.randint(0, 2 ** draw.randint(1, 52)) for _ in range(2000)),
    ]
    _, _, words = ask_page(tmp_path, [], [], numbers=numbers)
    assert words == [format_bytes(number) for number in numbers]


def test_a_bundle_says_which_laws_it_lacks_and_what_is_too_large(tmp_path):
    bundle = bundle_of(LabSettings(**TINY), [("naive", False)])
    assert set(bundle["laws"]) == {"naive many"}
    for settings, problem in (
        (LabSettings(**TINY, batch_size=8), "no law is known here for grad_cache of"),
        (LabSettings("naive", **TINY, batch_size=2**26), "more than 8 PiB are not counted"),
    ):
        with pytest.raises(subprocess.CalledProcessError):
            ask_page(tmp_path, [bundle], [[0, page_settings(settings)]])
        assert problem


def test_folding_loses_nothing():
    def unfolded(entries):
        for entry in entries:
            yield from [entry] if isinstance(entry, int) else list(unfolded(entry[1])) * entry[0]

    draw = random.Random(7)
    for _ in range(200):
        block = [draw.randint(0, 3) for _ in range(draw.randint(1, 12))]
        numbers = [draw.randint(0, 3), *block * draw.randint(0, 9), *block[:2] * draw.randint(0, 5)]
        assert list(unfolded(folded(numbers))) == numbers
    assert folded([1, 2, 3] * 40) == [[40, [1, 2, 3]]]


def test_bundles_on_disk_are_those_of_the_settings_and_the_index_finds_them(tmp_path):
    size = write_bundles(tmp_path, models=("tiny",), lengths=(16,), precisions=("float32",), devices=("cpu",))
    index = json.loads((tmp_path / "index.json").read_text())
    assert list(index["files"]) == ["tiny 16 float32 cpu"]
    written = json.loads((tmp_path / index["files"]["tiny 16 float32 cpu"]).read_text())
    assert written == json.loads(json.dumps(bundle_of(LabSettings(**TINY))))
    assert size == sum(path.stat().st_size for path in tmp_path.iterdir()) < 40_000
    assert all(
        start in [value for _, value in index["choices"][name]]
        for name, start in index["start"].items()
        if name != "budget"
    )


@pytest.mark.deep
def test_two_processes_write_what_one_writes(tmp_path):
    few = {"models": ("tiny",), "lengths": (16,), "precisions": ("float32",)}
    for processes in (1, 2):
        write_bundles(tmp_path / str(processes), processes=processes, **few)
    one, two = ({path.name: path.read_text() for path in (tmp_path / place).iterdir()} for place in "12")
    assert one == two and len(one) == 3  # of a processor, of a card, and the index


def test_a_bundle_of_texts_that_a_model_can_not_read_is_left_out(tmp_path):
    clip = {"models": ("clip-vit-b-32-text",), "precisions": ("float32",), "devices": ("cpu",)}
    write_bundles(tmp_path, lengths=(128,), **clip)
    assert json.loads((tmp_path / "index.json").read_text())["files"] == {}


def test_what_is_learnt_once_is_known_and_added_to(monkeypatch):
    monkeypatch.setattr(bundles, "_known", {})
    cached, naive = LabSettings(**TINY, batch_size=8, chunk_size=4), LabSettings("naive", **TINY, batch_size=8)
    assert bundles.known_bundle(cached) is None and not bundles.is_learnt(cached)
    bundles.learn(cached)
    assert bundles.is_learnt(replace(cached, batch_size=64, chunk_size=8, optimizer="sgd"))
    assert bundles.known_bundle(replace(cached, retain_chunks=2))["kinds"] == list(KINDS)
    assert not bundles.is_learnt(naive) and not bundles.is_learnt(replace(cached, chunk_size=1))
    bundles.learn(naive)
    assert set(bundles.known_bundle(cached)["laws"]) == {"grad_cache many", "naive many"}
    assert (
        bundles.is_learnt(replace(cached, tile_size=4)) and bundles.known_bundle(replace(cached, tile_size=4)) is None
    )


def test_the_modules_are_small_and_node_reads_them(tmp_path):
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in MODULES}
    assert max(lines.values()) <= 300 and sum(lines.values()) <= 900, lines
    joined = tmp_path / "joined.mjs"
    joined.write_text(page_module("laws", "looks", "picture", "view", "widget"), "utf-8")
    assert not re.search(r"^import ", joined.read_text("utf-8"), re.MULTILINE)
    for path in (*MODULES, joined):
        subprocess.run([node(), "--check", str(path)], check=True)
