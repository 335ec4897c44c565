"""The parts of README.md that the project itself knows: chapters, files, measured ratios, the sample. `make readme`.

    python tests/project/readme.py [--picture]        --picture: draw the picture at its top anew, too

A part stands between `<!-- name -->` and `<!-- /name -->`; test_project.py holds that it is up to date.
"""

import ast
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

from gclib import forecast_step
from gclib.course import plots
from gclib.course.chapters import CHAPTERS, written_chapters
from gclib.memory.recording import load_recordings
from gclib.support import ROOT

README = ROOT / "README.md"
RESULTS = ROOT / "tests" / "benchmarks" / "results"
STRIPS = "sentence-t., strips of a tile"
PICTURE = ROOT / "notebooks" / "images" / "naive_and_cached.png"
ST = "sentence-transformers' cached loss"
PLACES = {
    "notebooks/": "the course, one chapter a notebook; `solutions/` has the worked answers",
    "data/": "the data card; trainings, and steps on graphics cards, as recorded",
    "tests/": "mirrors gclib; `project/` holds README, pins and notebooks together",
}


def chapter_table() -> str:
    """Every chapter, linked where it is written."""
    written = written_chapters()
    rows = ["| | chapter | afterwards you can |", "|---|---|---|"]
    for chapter in CHAPTERS:
        title = f"[{chapter.title}](notebooks/{chapter.file}.ipynb)"
        title = title if chapter.number in written else f"{chapter.title} (planned)"
        rows.append(f"| {chapter.number:02d} | {title} | {chapter.able_to} |")
    return "\n".join(rows)


def file_tree() -> str:
    """The core's modules and every folder of the library, with the first sentence of their docstrings; other places."""
    package = ROOT / "gclib"
    core = sorted(path for path in package.glob("*.py") if path.name not in ("__init__.py", "__main__.py"))
    rooms = sorted(path for path in package.iterdir() if (path / "__init__.py").is_file())
    lines = [("gclib/", "the library")]
    lines += [(f"    {path.name}", gloss(path)) for path in core]
    lines += [(f"    {path.name}/", gloss(path / "__init__.py")) for path in rooms]
    lines += list(PLACES.items())
    width = max(len(name) for name, _ in lines)
    return "\n".join(["```text", *(f"{name:<{width}}  {text}" for name, text in lines), "```"])


def measured_table() -> str:
    """What the benchmarks last wrote: gclib over others, at the smallest batch and chunk, or with the most ranks."""
    steps, tiled, ring = (rows_of(name) for name in ("steps", "tiled", "ring"))
    steps = [row for row in steps if (row["batch_size"], row["chunk_size"]) == ("256", "16")]
    tiled = [row for row in tiled if row["batch_size"] == "8192"]
    ring = [row for row in ring if row["ranks"] == max(row["ranks"] for row in ring)]
    ours, peak, allocated = "gclib (defaults: sorted)", "peak_mib", "allocated_peak_bytes"
    compared = [
        ("`grad_cache_step`, B = 256, C = 16", "official GradCache", against(steps, ours, "official GradCache", peak)),
        ("", "sentence-transformers, cached", against(steps, ours, "sentence-transformers cached", peak)),
        ("`tiled_contrastive_loss`, B = 8,192", "the dense loss", against(tiled, "tiled", "dense", allocated)),
        ("", "open_clip's dense loss", against(tiled, "tiled", "open_clip, dense", allocated)),
        (f"`ring_contrastive_loss`, {ring[0]['ranks']} processes, B = 4,096", "the gathered dense loss",
         against(ring, "ring", "gathered, dense", "peak_bytes")),
    ]  # fmt: skip
    rows = ["| | against | time | peak bytes |", "|---|---|---|---|"]
    return "\n".join(rows + [f"| {what} | {other} | {found} |" for what, other, found in compared])


def card_table() -> str:
    """What was measured on graphics cards: tiles beside others, and forecasts that were made without a card."""
    table = rows_of("tiled_cuda")
    tiled = [row for row in table if row["version"] == "tiled" and row["seconds"] and int(row["batch_size"]) >= 32_768]
    strips = f"over sentence-transformers' strips of {int(tiled[0]['tile_size']):,} rows: time, bytes"
    rows = [f"| B | `tiled_contrastive_loss` | over the dense loss: time, bytes | {strips} |", "|---|---|---|---|"]
    for row in tiled:
        others = [find_row(table, name, row["batch_size"]) for name in ("dense", STRIPS)]
        own = f"{float(row['seconds']):.2f} s, {int(row['allocated_peak_bytes']) / 2**20:,.0f} MiB"
        rows.append(f"| {int(row['batch_size']):,} | {own} | {' | '.join(beside(row, other) for other in others)} |")
    lines = [
        f"On an {tiled[0]['device']}:",
        "",
        *rows,
        "",
        "Forecasts of BERT-base (vocabulary 8,000), with the card's workspace, against `max_memory_allocated`:",
        "",
    ]
    for recording in load_recordings():
        card, errors = recording.calibration, []
        for words, autocast in (("float32", False), ("bf16 autocast", True)):
            off = [abs(reading.ratio - 1) for reading in card.readings if reading.case.autocast == autocast]
            if off:
                errors.append(f"{max(off):.1%} off in {len(off)} steps of {words}")
        lines.append(f"- {card.device}: at most {', '.join(errors)}")
    return "\n".join(lines)


def card_steps() -> str:
    """Our step's time on a card over others', the ones that it loses first; and over itself with other settings."""
    table = rows_of("steps_cuda_bert-base")
    first = table[0]
    size = first["batch_size"], first["chunk_size"]
    bars, table = (
        [row for row in rows if (row["batch_size"], row["chunk_size"]) == size]
        for rows in (rows_of("steps_cuda_bert-base_bars"), table)
    )
    seconds = {row["version"]: float(row["seconds"]) for row in table}
    peaks = {row["version"]: float(row["peak_mib"]) / 1024 for row in table}
    ours = "gclib (defaults: sorted)"
    rounds = {row["bar"].partition(" (")[0].removeprefix("time / "): float(row["ratio"]) for row in bars}
    rounds["naive, padded"] = float(find_row(table, ours, size[0])["over_naive"])
    rivals = {"naive, padded": "the naive step", "official GradCache": "official GradCache"}
    rivals["sentence-transformers cached"] = ST
    time_of = f"median ratio of time, {first['rounds']} rounds"
    rows = [f"| `grad_cache_step`, seconds, peak | over | {time_of} | peak bytes |", "|---|---|---|---|"]
    ratios = [(rounds[key], peaks[ours] / peaks[key], words) for key, words in rivals.items()]
    for number, (time, share, words) in enumerate(sorted(ratios, reverse=True)):
        own = f"{seconds[ours]:.2f} s, {peaks[ours]:.1f} GiB" if number == 0 else ""
        rows.append(f"| {own} | {words} | {time:.2f} | {share:.2f} |")
    quickest = {"gclib, packed by tokens": "`chunk_tokens`", "gclib, sorted, a quarter retained": "a quarter retained"}
    better = [f"{words}: {seconds[key]:.2f} s, {peaks[key]:.1f} GiB" for key, words in quickest.items()]
    where = f"On an {first['device']}, BERT-base (vocabulary 8,000), B = {size[0]}, C = {size[1]}"
    where += "; peaks without weights and gradients:"
    return "\n".join([where, "", *rows, "", f"With {'; '.join(better)}."])


def trainer_table() -> str:
    """Our loss beside sentence-transformers' cached one in its trainer, at each of its settings; where we lose, too."""
    ours, *others = rows_of("sentence_transformers")
    rows = ["| | setting | peak, MiB | seconds |", "|---|---|---|---|"]
    timed = [row for row in others if row["over_ours"]]
    for row in (ours, *timed):
        name, _, kind = row["version"].partition(", ")
        knob = {"rows": "mini_batch_size", "tokens": "mini_batch_num_tokens"}.get(kind, "chunk_size")
        who = "`GradCacheLoss`" if row is ours else ST
        rows.append(
            f"| {who} | `{knob}={row['setting']}` | {float(row['peak_mib']):,.0f} | {float(row['seconds']):.1f} |"
        )
    raced = min(timed, key=lambda row: float(row["seconds"]))
    quickest = min(others, key=lambda row: float(row["first_seconds"]))  # in the first run, which all had
    fewer, more = (float(row["peak_mib"]) / float(ours["peak_mib"]) for row in (raced, quickest))
    told = f"Ours takes {1 / float(raced['over_ours']):.2f} of its time at {raced['setting']} rows "
    told += f"({fewer:.2f} of our bytes), "
    first = float(ours["first_seconds"]) / float(quickest["first_seconds"])
    told += f"{first:.2f} of that at {int(quickest['setting']):,} tokens ({more:.1f} times ours, one run)."
    return "\n".join([*rows, "", told])


def draw_picture() -> None:
    """The bytes of the sample's two steps, forecast, on one scale."""
    sizes = {"config": "tiny", "batch_size": 512, "query_length": 32, "passage_length": 32}
    with plots.style():
        figure, panels = plots.new_figure(1, 2, width=10.5, height=3.6)
        for axes, (step, name, chunk) in zip(
            panels, [("naive", "Naive", None), ("grad_cache", "Gradient cache, 16 rows at once", 16)], strict=True
        ):
            forecast = forecast_step(step, chunk_size=chunk, **sizes)
            plots.plot_timeline(axes, forecast.timeline)
            axes.get_legend().remove()  # at this size one kind is seen
            axes.set_title(f"{name}: {forecast.peak_bytes / 2**20:.1f} MiB at the peak")
        panels[1].set_ylim(panels[0].get_ylim())
        PICTURE.write_bytes(plots.to_png(figure))


def find_row(rows: list[dict[str, str]], version: str, batch_size: str) -> dict[str, str]:
    """The row of one version at one batch size."""
    return next(row for row in rows if (row["version"], row["batch_size"]) == (version, batch_size))


def beside(row: dict[str, str], other: dict[str, str]) -> str:
    """The ratios of time and of peak bytes to another row's, or why it has none."""
    if not other["seconds"]:
        return other["note"]
    time, share = (float(row[key]) / float(other[key]) for key in ("seconds", "allocated_peak_bytes"))
    return f"{time:.2f}, 1/{1 / share:.0f}"


def rows_of(name: str) -> list[dict[str, str]]:
    """A benchmark's CSV."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def against(rows: list[dict[str, str]], ours: str, other: str, peak: str) -> str:
    """The ratios of time and of peak bytes, as two cells."""
    both = [next(row for row in rows if name in row.values()) for name in (ours, other)]
    ratios = [float(both[0][key]) / float(both[1][key]) for key in ("seconds", peak)]
    return " | ".join(f"{ratio:.2f}" if ratio >= 0.1 else f"1/{1 / ratio:.0f}" for ratio in ratios)


def gloss(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    words = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split())
    return re.split(r"(?<=[.!?])\s", words)[0].rstrip(".")


def sample(text: str) -> str:
    """The code of the README's sample."""
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def sample_output(text: str) -> str:
    """What the sample prints when it is run in a fresh process."""
    command = [sys.executable, "-c", sample(text)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=plain_environment(), check=True)
    return f"```text\n{done.stdout}```"


def plain_environment() -> dict[str, str]:
    """The environment of a user: without what the tests switch on."""
    return {name: value for name, value in os.environ.items() if name != "GCLIB_CHECK_SHAPES"}


PARTS = {
    "chapters": lambda text: chapter_table(),
    "tree": lambda text: file_tree(),
    "measured": lambda text: measured_table(),
    "card-steps": lambda text: card_steps(),
    "trainer": lambda text: trainer_table(),
    "cards": lambda text: card_table(),
    "output": sample_output,
}


def filled(text: str, *names: str) -> str:
    """The README with the named parts (by default all) as they are today."""
    for name in names or PARTS:
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        part = PARTS[name](text)
        text = pattern.sub(lambda found, part=part: f"{found[1]}\n{part}\n\n{found[2]}", text)
    return text


if __name__ == "__main__":
    if "--picture" in sys.argv[1:]:
        draw_picture()
    README.write_text(filled(README.read_text("utf-8")), "utf-8")
