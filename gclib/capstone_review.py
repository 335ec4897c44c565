"""What a plan for a brief is worth: a score for each decision, with its reason and what a better one would have gained.

Decisions are judged in the order in which they are taken. The score of one is what the best plan *with* it is worth,
over what the best plan was worth before it: examples a second times the share of the wanted negatives, and nothing for
a plan that does not fit the card. So the scores multiply, nearly, to the worth of the whole plan, and none is a matter
of taste: all of it is `forecast_step` and `forecast_flops`. Nothing here raises for what a reader has typed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gclib.capstone import (
    TILED_FLOPS,
    Brief,
    Job,
    Plan,
    best_with,
    fits,
    forecast,
    hours,
    negatives,
    peak_bytes,
    read_plan,
    reference,
    seconds,
    worth,
)
from gclib.lab import format_table
from gclib.units import GiB, format_bytes
from gclib.validation import positive_number

ORDER = {
    "step": "step",
    "batch_size": "B",
    "tile_size": "tile",
    "chunk_size": "C",
    "retain_chunks": "R",
    "sort_by_length": "order",
}
NEAR = 0.02  # a prediction this near to a number is taken for it
GOOD = 0.05  # a prediction this near to the truth needs no comment
AS_GOOD = 0.99  # the cost model knows no better than that


@dataclass(frozen=True)
class Score:
    """One decision or prediction: from 0 to 1, and why, in words."""

    name: str
    chosen: str
    score: float
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: you said {self.chosen or 'nothing'}. Score {self.score:.2f}: {self.reason}."


@dataclass(frozen=True)
class Review:
    """A plan, judged. plan: None where it cannot be run at all, and `problem` says why.

    worth: of the whole plan, from 0 to 1, the reference's being 1. passed: it fits, in time, with the wanted negatives.
    """

    brief: Brief
    plan: Plan | None
    problem: str = ""
    scores: tuple[Score, ...] = ()
    worth: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the brief is served."""
        return self.plan is not None and all(self.kept().values())

    def kept(self) -> dict[str, bool]:
        """Which of the brief's three demands the plan keeps; none where there is no plan."""
        if self.plan is None:
            return dict.fromkeys(("card", "deadline", "negatives"), False)
        job = self.brief.job
        return {
            "card": fits(job, self.plan),
            "deadline": hours(self.brief, self.plan) <= self.brief.deadline_hours,
            "negatives": negatives(job, self.plan) >= job.wanted_negatives,
        }

    def __str__(self) -> str:
        if self.plan is None:
            return f"This plan can't be run: {self.problem}."
        lines = [f"Your plan: {self.plan}.", *self._demands(), ""]
        table = [[part.name, part.chosen, f"{part.score:.2f}", part.reason] for part in self.scores]
        lines.append(format_table(["decision", "yours", "score", "why"], table))
        verdict = "It serves the brief" if self.passed else "It does not serve the brief"
        lines.append(f"\n{verdict}, and is worth {self.worth:.2f} of the best plan that was found.")
        return "\n".join(lines)

    def _demands(self) -> list[str]:
        job, kept = self.brief.job, self.kept()
        found = {
            "card": (format_bytes(peak_bytes(job, self.plan)), format_bytes(job.budget_bytes)),
            "deadline": (f"{hours(self.brief, self.plan):.1f} hours", f"{self.brief.deadline_hours:g} hours"),
            "negatives": (f"{negatives(job, self.plan):,}", f"{job.wanted_negatives:,}"),
        }
        return [f"  {name:9} {'kept  ' if kept[name] else 'BROKEN'}  {a} of {b}" for name, (a, b) in found.items()]


def review(brief: Brief, given: object) -> Review:
    """Judge `given`, a Plan or a dict of its fields. What cannot be run is told in `problem`; nothing is raised."""
    if given is None:
        return Review(brief, None, "there is no plan yet")
    try:
        plan = read_plan(brief, given)
    except (ValueError, TypeError) as error:
        return Review(brief, None, str(error))
    share = worth(brief.job, plan) / worth(brief.job, reference(brief.job))
    return Review(brief, plan, "", tuple(_judge(brief, plan)), _share(share))


def _share(ratio: float) -> float:
    """A ratio of worths as a score: what the cost model cannot tell from the best is 1."""
    return 1.0 if ratio >= AS_GOOD else ratio


def _judge(brief: Brief, plan: Plan) -> list[Score]:
    job, fixed, scores = brief.job, {}, []
    best = reference(job)
    for name, shown in ORDER.items():
        if not _applies(name, plan):
            continue
        chosen = getattr(plan, name)
        now = best_with(job, **fixed, **{name: chosen})
        scores.append(_score(brief, shown, name, chosen, best, now))
        fixed[name] = getattr(best, name) if now is None else chosen
        best = best if now is None else now
    return scores


def _applies(name: str, plan: Plan) -> bool:
    if name == "chunk_size":
        return plan.step != "naive"
    return name not in ("retain_chunks", "sort_by_length") or plan.step == "grad_cache"


def _score(brief: Brief, shown: str, name: str, chosen: Any, best: Plan, now: Plan | None) -> Score:
    job, words = brief.job, _word(name, chosen)
    if now is None:
        return Score(shown, words, 0.0, _too_much(job, name, chosen, best))
    ratio = _share(worth(job, now) / worth(job, best))
    if name == "tile_size" and chosen is not None and _dense_does_as_well(job, best, now):
        return Score(shown, words, min(ratio, 1 / TILED_FLOPS), _needless_tile(brief, best, now))
    if ratio == 1:
        return Score(shown, words, 1.0, "as good as any")
    better = _word(name, getattr(best, name))
    return Score(shown, words, ratio, f"{better} would gain {_gain(brief, now, best)}")


def _word(name: str, value: Any) -> str:
    """A decision as the table shows it."""
    if name == "sort_by_length":
        return "sorting" if value else "file order"
    return "none" if value is None else value if isinstance(value, str) else f"{value:,}"


def _dense_does_as_well(job: Job, best: Plan, now: Plan) -> bool:
    """Whether the dense loss does as well as the best plan with a tile."""
    dense = (
        best if best.tile_size is None else best_with(job, step=best.step, batch_size=now.batch_size, tile_size=None)
    )
    return dense is not None and worth(job, dense) >= AS_GOOD * worth(job, now)


def _too_much(job: Job, name: str, chosen: Any, best: Plan) -> str:
    """Why a decision leaves nothing that fits."""
    tried = replace(best, **{name: chosen})
    if name in ("batch_size", "tile_size") and tried.chunk_size is not None:
        tried = replace(tried, chunk_size=min(tried.chunk_size, 4), retain_chunks=0)
    if name == "chunk_size":
        tried = replace(tried, retain_chunks=0)
    peak, over = peak_bytes(job, tried), peak_bytes(job, tried) - job.budget_bytes
    way_out = {
        "step": "another step would fit",
        "batch_size": f"with this step {best.batch_size:,} would fit",
        "tile_size": f"tiles of {best.tile_size or 0:,} would fit",
        "chunk_size": f"chunks of {best.chunk_size or 0:,} would fit",
        "retain_chunks": f"R = {best.retain_chunks:,} would fit",
    }
    return f"takes {format_bytes(peak)}, {format_bytes(over)} over the card: {way_out.get(name, 'nothing fits')}"


def _needless_tile(brief: Brief, best: Plan, now: Plan) -> str:
    dense = replace(now, tile_size=None)
    matrix = 4 * now.batch_size**2 * (1 + brief.job.negatives)
    lost = hours(brief, now) - hours(brief, dense)
    return (
        f"the dense logits fit ({format_bytes(matrix)} a matrix); tiles compute them twice, 8 products for 6: "
        f"{_hours(lost)} more"
    )


def _gain(brief: Brief, now: Plan, better: Plan) -> str:
    """What `better` has over `now`: hours, negatives."""
    parts = []
    more = negatives(brief.job, better) - negatives(brief.job, now)
    if more > 0:
        parts.append(f"{more:,} negatives a query")
    elif more < 0:
        parts.append(f"the batch that is asked for, {-more:,} negatives a query fewer")
    saved = hours(brief, now) - hours(brief, better)
    if saved > 0:
        parts.append(_hours(saved))
    return " and ".join(parts)


def _hours(count: float) -> str:
    """Hours in words; less than a tenth of one in minutes, less than a minute in seconds."""
    if count >= 0.1:
        return f"{count:.1f} hours"
    return f"{60 * count:.1f} minutes" if count >= 1 / 60 else f"{3600 * count:.0f} seconds"


# --- predictions ----------------------------------------------------------------------------------------------


def judge_peak(brief: Brief, given: object, peak_gib: object) -> Score:
    """A predicted peak in GiB against the forecast: the smaller over the larger, and the mistake behind it if known."""
    try:
        plan = read_plan(brief, given)
    except (ValueError, TypeError) as error:
        return Score("peak", str(peak_gib), 0.0, f"there is no plan to predict for: {error}")
    found = peak_bytes(brief.job, plan)
    mistakes = {name: value / GiB for name, value in _mistaken_peaks(brief, plan).items()}
    return _judge_number("peak", peak_gib, found / GiB, "GiB", mistakes)


def judge_hours(brief: Brief, given: object, predicted: object) -> Score:
    """Predicted hours against the cost model's."""
    try:
        plan = read_plan(brief, given)
    except (ValueError, TypeError) as error:
        return Score("hours", str(predicted), 0.0, f"there is no plan to predict for: {error}")
    return _judge_number("hours", predicted, hours(brief, plan), "hours", _mistaken_hours(brief, plan))


def _mistaken_peaks(brief: Brief, plan: Plan) -> dict[str, float]:
    job, found = brief.job, peak_bytes(brief.job, plan)
    naive = Plan("naive", plan.batch_size, plan.tile_size)
    mistakes = {
        "that is in GB (10^9 bytes); GiB are 2^30": found * GiB / 1e9,
        "that is the naive step's peak, which keeps every row's graph": peak_bytes(job, naive),
    }
    if plan.retain_chunks:
        mistakes["the graphs of the retained chunks are forgotten"] = peak_bytes(job, replace(plan, retain_chunks=0))
    at_peak = forecast(job, plan).at_peak()
    states = sum(at_peak[kind] for kind in ("parameters", "gradients", "optimizer"))
    mistakes["parameters, gradients and AdamW's two states are forgotten"] = found - states
    if at_peak["loss"]:
        mistakes["the logits are forgotten"] = found - at_peak["loss"]
    if plan.tile_size is not None:
        mistakes["that is with dense logits"] = peak_bytes(job, replace(plan, tile_size=None))
    return mistakes


def _mistaken_hours(brief: Brief, plan: Plan) -> dict[str, float]:
    naive = hours(brief, Plan("naive", plan.batch_size, plan.tile_size))
    mistakes = {"that is the naive step's time": naive, "that is in seconds": 3600 * hours(brief, plan)}
    mistakes["that is one update's seconds"] = seconds(brief.job, plan)
    if plan.step == "grad_cache":
        plain = hours(brief, replace(plan, sort_by_length=False, retain_chunks=0))
        mistakes |= {
            "that is 2 times the naive step's time; only the forward is done twice, 4/3": 2 * naive,
            "that is without sorting and without retained chunks": plain,
            "the retained chunks are forgotten": hours(brief, replace(plan, retain_chunks=0)),
        }
    return mistakes


def _judge_number(name: str, given: object, truth: float, unit: str, mistakes: Mapping[str, float]) -> Score:
    try:
        number = positive_number(name, given)
    except (ValueError, OverflowError):
        return Score(name, str(given)[:20], 0.0, f"a number of {unit} above 0 is asked for")
    said, share = f"{number:.3g}", min(number / truth, truth / number)
    if share >= 1 - GOOD:
        return Score(name, said, 1.0, f"forecast: {truth:.3g} {unit}")
    for words, value in mistakes.items():
        if value > 0 and abs(number / value - 1) <= NEAR:
            return Score(name, said, share, f"forecast: {truth:.3g} {unit}; {words}")
    return Score(name, said, share, f"forecast: {truth:.3g} {unit}; yours is {number / truth:.2g} times that")


# --- the defence ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A sentence about a plan that a colleague might say; whether it holds, and the numbers that decide it."""

    text: str
    holds: bool
    why: str


def claims(brief: Brief, given: object) -> list[Claim]:
    """Five claims about a plan for the brief, judged by forecasts. ValueError for a plan that can't be run."""
    plan = read_plan(brief, given)
    chunk = plan.chunk_size or min(64, plan.batch_size)
    return [
        _claim_naive(brief.job),
        _claim_accumulation(brief.job, plan, max(1, min(chunk, plan.batch_size // 2))),
        _claim_half(brief.job, replace(plan, retain_chunks=0)),
        _claim_logits(brief.job, plan.batch_size),
        _claim_sorted(brief, Plan("grad_cache", plan.batch_size, plan.tile_size, chunk)),
    ]


def _claim_naive(job: Job) -> Claim:
    naive = Plan("naive", job.batch_size)
    said = f"{format_bytes(peak_bytes(job, naive))} of {format_bytes(job.budget_bytes)}"
    return Claim(f"The naive step with B = {job.batch_size:,} would fit the card.", fits(job, naive), said)


def _claim_accumulation(job: Job, plan: Plan, chunk: int) -> Claim:
    few = negatives(job, Plan("accumulation", plan.batch_size, None, chunk))
    all_of_them = plan.batch_size * (1 + job.negatives) - 1
    said = f"{few:,} negatives a query against {all_of_them:,}"
    text = f"Accumulation in chunks of {chunk:,} would give the naive step's gradient, at the naive step's price."
    return Claim(text, few == all_of_them, said)


def _claim_half(job: Job, plan: Plan) -> Claim:
    """Whether the peak goes with the batch, R being 0."""
    half = replace(plan, batch_size=max(1, plan.batch_size // 2))
    if plan.chunk_size is not None:
        half = replace(half, chunk_size=min(plan.chunk_size, half.batch_size))
    share = peak_bytes(job, half) / peak_bytes(job, plan)
    chunks = "" if plan.chunk_size is None else " in the same chunks, nothing retained,"
    text = f"Half the batch{chunks} would take less than 60 % of what all of it takes."
    return Claim(text, share < 0.6, f"half takes {share:.0%} of it")


def _claim_logits(job: Job, batch_size: int) -> Claim:
    matrix = 4 * batch_size**2 * (1 + job.negatives)
    share = matrix / job.budget_bytes
    text = "One dense B x N matrix of float32 logits would take more than a tenth of what the card leaves."
    return Claim(text, share > 0.1, f"{format_bytes(matrix)}, {share:.1%}")


def _claim_sorted(brief: Brief, cached: Plan) -> Claim:
    ratio = hours(brief, cached) / hours(brief, replace(cached, sort_by_length=False))
    text = f"Sorting by length would save gradient caching in chunks of {cached.chunk_size:,} a quarter of its time."
    return Claim(text, ratio <= 0.75, f"it takes {ratio:.2f} of the time without")


def judge_claims(found: Sequence[Claim], answers: Mapping[int, object]) -> str:
    """Each claim with what was said of it (by its place, from 1; True: it holds); if anything, the deciding numbers."""
    if not isinstance(answers, Mapping):
        return "Answers are a dict of True (it holds) or False for each claim's number, such as {1: True, 2: False}."
    lines, right = [], 0
    for place, claim in enumerate(found, start=1):
        said = answers.get(place)
        if said is None:
            lines.append(f"{place}. {claim.text}\n   not answered yet.")
            continue
        good = isinstance(said, bool) and said == claim.holds
        right += good
        truth = "holds" if claim.holds else "does not hold"
        lines.append(f"{place}. {claim.text}\n   {'right' if good else 'wrong'}: it {truth} ({claim.why}).")
    return "\n".join([*lines, f"{right} of {len(found)} right."])
