"""The course as data: sixteen chapters, what each one needs, and a picture of that.

A chapter counts as written when its notebook is there; nothing here opens a notebook.
"""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import TYPE_CHECKING

from gclib.support import ROOT
from gclib.support.validation import refuse

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _find_project() -> Path:
    """The folder of notebooks, data and measured tables: the checkout, or where an installed wheel put them."""
    first = "00_start_here.ipynb"
    if not (ROOT / "notebooks" / first).is_file():
        with suppress(PackageNotFoundError):
            for file in files("gclib") or ():
                if file.match(f"gclib/notebooks/{first}"):
                    return Path(file.locate()).resolve().parents[1]
    return ROOT


PROJECT = _find_project()
NOTEBOOKS = PROJECT / "notebooks"


@dataclass(frozen=True)
class Chapter:
    """One chapter. needs: chapters to read before; place: (column, row) on the map, rows from the top."""

    number: int
    file: str
    title: str
    able_to: str
    needs: tuple[int, ...]
    place: tuple[int, int]


CHAPTERS = (
    Chapter(
        0,
        "00_start_here",
        "Start here",
        "start, read the map, use a slider",
        (),
        (1, 0),
    ),
    Chapter(
        1,
        "01_in_batch_negatives",
        "In-batch negatives",
        "derive the loss; say what batch size buys",
        (0,),
        (1, 1),
    ),
    Chapter(
        2,
        "02_the_memory_wall",
        "The memory wall",
        "measure where the bytes go",
        (1,),
        (0, 2),
    ),
    Chapter(
        3,
        "03_accumulation_is_not_enough",
        "Accumulation is not enough",
        "say which negatives get lost",
        (1,),
        (1, 2),
    ),
    Chapter(
        4,
        "04_the_chain_rule_decouples",
        "The chain rule decouples",
        "derive the split, and do it by hand",
        (3,),
        (1, 3),
    ),
    Chapter(
        5,
        "05_gradient_cache_from_scratch",
        "Gradient cache from scratch",
        "write it in 20 lines; prove it",
        (4,),
        (1, 4),
    ),
    Chapter(
        6,
        "06_live_memory_lab",
        "The live memory lab",
        "choose batch and chunk for a card",
        (2, 5),
        (0, 5),
    ),
    Chapter(
        7,
        "07_the_price_is_time",
        "The price is time",
        "say what it costs, and pay less",
        (5,),
        (1, 5),
    ),
    Chapter(
        8,
        "08_near_infinite_batches",
        "Near-infinite batches",
        "compute the loss one tile at a time",
        (6,),
        (0, 6),
    ),
    Chapter(
        9,
        "09_many_gpus",
        "Many GPUs",
        "gather, reduce once, run two ranks",
        (8,),
        (0, 7),
    ),
    Chapter(
        10,
        "10_does_it_help",
        "Does it help?",
        "train all three ways on real data",
        (5,),
        (2, 5),
    ),
    Chapter(
        11,
        "11_in_the_wild",
        "In the wild",
        "find the knobs in public libraries",
        (7,),
        (1, 6),
    ),
    Chapter(
        12,
        "12_what_goes_into_the_batch",
        "What goes into the batch",
        "masks, duplicates, hard negatives",
        (10,),
        (2, 6),
    ),
    Chapter(
        13,
        "13_bigger_models",
        "Bigger models, real trainers",
        "use it in your trainer; LoRA, shards, NaN",
        (9, 11),
        (1, 8),
    ),
    Chapter(
        14,
        "14_other_ways_out",
        "Other ways out",
        "queue, sigmoid, bank beside it",
        (12,),
        (2, 8),
    ),
    Chapter(
        15,
        "15_capstone",
        "Capstone",
        "choose, predict, train and defend",
        (13, 14),
        (1, 9),
    ),
)

_COLUMN, _ROW = 3.0, 0.9  # inches between the centres of two boxes
_BOX_WIDTH, _BOX_HEIGHT = 2.8, 0.58


def written_chapters(folder: Path = NOTEBOOKS) -> set[int]:
    """Numbers of the chapters whose notebook is in `folder`."""
    return {chapter.number for chapter in CHAPTERS if (folder / f"{chapter.file}.ipynb").is_file()}


def describe_map(written: Collection[int]) -> str:
    """The map in words, for a reader who cannot see the picture: each chapter, and what it builds on."""
    sentences = []
    for chapter in CHAPTERS:
        needs = ", ".join(f"{number:02d}" for number in chapter.needs)
        state = "" if chapter.number in written else " (planned)"
        builds = f" builds on {needs}" if needs else " comes first"
        sentences.append(f"{chapter.number:02d} {chapter.title}{state}{builds}.")
    return " ".join(sentences)


def plot_map(axes: "Axes", written: Collection[int]) -> None:
    """Draw every chapter as a box on `axes`, with arrows from what it needs; those not in `written` say "planned".

    Raises ValueError when `written` holds a number that is no chapter's.
    """
    numbers = {chapter.number for chapter in CHAPTERS}
    if unknown := sorted(set(written) - numbers):
        raise refuse("written", f"must hold chapter numbers from 0 to {max(numbers)}", unknown)
    for chapter in CHAPTERS:
        for number in chapter.needs:
            _draw_arrow(axes, CHAPTERS[number], chapter)
    for chapter in CHAPTERS:
        _draw_box(axes, chapter, chapter.number in written)
    columns, rows = zip(*(chapter.place for chapter in CHAPTERS), strict=True)
    axes.set_xlim(-0.5 * _COLUMN, (max(columns) + 0.5) * _COLUMN)
    axes.set_ylim((max(rows) + 0.5) * _ROW, -0.5 * _ROW)
    axes.set_aspect("equal")
    axes.axis("off")


def _draw_arrow(axes: "Axes", start: Chapter, end: Chapter) -> None:
    (x0, y0), (x1, y1) = start.place, end.place
    axes.annotate(
        "",
        xy=(x1 * _COLUMN, y1 * _ROW - _BOX_HEIGHT / 2),
        xytext=(x0 * _COLUMN, y0 * _ROW + _BOX_HEIGHT / 2),
        arrowprops={"arrowstyle": "-|>", "color": "#666666", "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0},
    )


def _draw_box(axes: "Axes", chapter: Chapter, is_written: bool) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = chapter.place[0] * _COLUMN, chapter.place[1] * _ROW
    box = FancyBboxPatch(
        (x - _BOX_WIDTH / 2, y - _BOX_HEIGHT / 2),
        _BOX_WIDTH,
        _BOX_HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor="#DCEEF9" if is_written else "#FFFFFF",
        edgecolor="#0072B2" if is_written else "#777777",
        linestyle="-" if is_written else "--",
        linewidth=1.6 if is_written else 1.0,
    )
    axes.add_patch(box)
    weight = "bold" if is_written else "normal"
    below = chapter.able_to if is_written else f"planned: {chapter.able_to}"
    axes.text(x, y - 0.12, f"{chapter.number:02d}  {chapter.title}", ha="center", va="center", weight=weight, size=9)
    axes.text(x, y + 0.13, below, ha="center", va="center", size=7.2)
