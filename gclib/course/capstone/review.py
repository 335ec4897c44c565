"""What a plan for a brief is worth: a score for each decision, with its reason and what a better one would have gained.

Decisions are judged in the order in which they are taken. The score of one is what the best plan *with* it is worth,
over what the best plan was worth before it: examples a second times the share of the wanted negatives, and nothing for
a plan that does not fit the card. So the scores multiply, nearly, to the worth of the whole plan, and none is a matter
of taste: all of it is `forecast_step` and `forecast_flops`. Nothing here raises for what a reader has typed.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gclib.course.capstone.briefs import (
    RIGHT_AMONG_NEGATIVES,
    TILED_FLOPS,
    Brief,
    Scenario,
    TrainingPlan,
    best_with,
    fits,
    forecast,
    hours,
    negatives,
    peak_bytes,
    read_plan,
    reference,
    right_among_negatives,
    seconds,
    updates,
    worth,
)
from gclib.support.validation import positive_number
from gclib.support.words import GiB, format_bytes, format_table

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
ANSWERS = "a dict of True (it holds) or False for each claim's number, such as {1: True, 2: False}"


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

    worth: of the whole plan, from 0 to 1, the reference's being 1. gain: by how much it is worth more. passed: it fits,
    in time, with the wanted negatives.
    """

    brief: Brief
    plan: TrainingPlan | None
    problem: str = ""
    scores: tuple[Score, ...] = ()
    worth: float = 0.0
    gain: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the brief is served."""
        return self.plan is not None and all(self.kept().values())

    def kept(self) -> dict[str, bool]:
        """Which of the brief's demands the plan keeps; none where there is no plan."""
        if self.plan is None:
            return dict.fromkeys(("card", "deadline", "negatives"), False)
        scenario = self.brief.scenario
        demands = {
            "card": fits(scenario, self.plan),
            "deadline": hours(self.brief, self.plan) <= self.brief.deadline_hours,
            "negatives": negatives(scenario, self.plan) >= scenario.wanted_negatives,
        }
        if scenario.limited:
            demands["demand"] = _within(self.brief, self.plan)
        return demands

    def __str__(self) -> str:
        if self.plan is None:
            return f"This plan can't be run: {self.problem}."
        lines = [f"Your plan: {self.plan}.", *self._demands(), ""]
        table = [[part.name, part.chosen, f"{part.score:.2f}", part.reason] for part in self.scores]
        lines.append(format_table(["decision", "yours", "score", "why"], table))
        verdict = "It serves the brief" if self.passed else "It does not serve the brief"
        lines.append(f"\n{verdict}, and is worth {self.worth:.2f} of the best plan that was found.")
        if self.passed and self.gain > 0.0005:
            taken = "the simplest is taken of those within a hundredth, and not all sizes are tried"
            lines.append(f"It is {self.gain:.1%} better than that plan: {taken}.")
        return "\n".join(lines)

    def _demands(self) -> list[str]:
        scenario, fulfilled = self.brief.scenario, self.kept()
        amounts = {
            "card": (format_bytes(peak_bytes(scenario, self.plan)), format_bytes(scenario.budget_bytes)),
            "deadline": (f"{hours(self.brief, self.plan):.1f} hours", f"{self.brief.deadline_hours:g} hours"),
            "negatives": (f"{negatives(scenario, self.plan):,}", f"{scenario.wanted_negatives:,}"),
        }
        if scenario.updates:
            amounts["demand"] = (f"{updates(self.brief, self.plan):,}", f"{scenario.updates:,} updates at least")
        elif scenario.limited:
            right = f"{right_among_negatives(scenario, self.plan):.3g}"
            amounts["demand"] = (right, f"{RIGHT_AMONG_NEGATIVES:g} right passages at most among a query's negatives")
        words = {True: "kept  ", False: "BROKEN"}
        return [f"  {name:9} {words[fulfilled[name]]}  {a} of {b}" for name, (a, b) in amounts.items()]


def review(brief: Brief, given: object) -> Review:
    """Judge `given`, a TrainingPlan or a dict of its fields; what cannot be run is told in `problem`, never raised."""
    if given is None:
        return Review(brief, None, "there is no plan yet")
    try:
        plan = read_plan(brief, given)
    except (ValueError, TypeError) as error:
        return Review(brief, None, str(error))
    best = reference(brief.scenario)
    share = _share(brief.scenario, plan, best)
    if negatives(brief.scenario, plan) < brief.scenario.wanted_negatives or not _within(brief, plan):
        share = min(share, AS_GOOD)
    highest = worth(brief.scenario, best)
    gain = max(0.0, worth(brief.scenario, plan) / highest - 1.0) if highest else 0.0
    return Review(brief, plan, "", tuple(_judge(brief, plan)), share, gain)


def _within(brief: Brief, plan: TrainingPlan) -> bool:
    """Whether a batch leaves what a brief asks for that does not say the batch."""
    scenario = brief.scenario
    enough = updates(brief, plan) >= scenario.updates
    return enough and right_among_negatives(scenario, plan) <= RIGHT_AMONG_NEGATIVES


def _share(scenario: Scenario, plan: TrainingPlan, best: TrainingPlan) -> float:
    """The ratio of worths as a score: what the cost model cannot tell from the best is 1; so is none of none."""
    highest = worth(scenario, best)
    ratio = worth(scenario, plan) / highest if highest else 1.0
    return 1.0 if ratio >= AS_GOOD else ratio


def _judge(brief: Brief, plan: TrainingPlan) -> list[Score]:
    scenario, fixed, scores = brief.scenario, {}, []
    best = reference(scenario)
    for name, shown in ORDER.items():
        if not _applies(name, plan):
            continue
        chosen = getattr(plan, name)
        now = best_with(scenario, **fixed, **{name: chosen})
        scores.append(_score(brief, shown, name, chosen, best, now))
        fixed[name] = getattr(best, name) if now is None else chosen
        best = best if now is None else now
    return scores


def _applies(name: str, plan: TrainingPlan) -> bool:
    if name == "chunk_size":
        return plan.step != "naive"
    return name not in ("retain_chunks", "sort_by_length") or plan.step == "grad_cache"


def _score(brief: Brief, shown: str, name: str, chosen: Any, best: TrainingPlan, now: TrainingPlan | None) -> Score:
    scenario, words = brief.scenario, _word(name, chosen)
    if now is None:
        return Score(shown, words, 0.0, _too_much(scenario, name, chosen, best))
    ratio = _share(scenario, now, best)
    if name == "tile_size" and chosen is not None and _dense_does_as_well(scenario, best, now):
        return Score(shown, words, min(ratio, 1 / TILED_FLOPS), _needless_tile(brief, best, now))
    if name == "batch_size" and chosen > scenario.batch_size:
        if not _within(brief, now):
            return Score(shown, words, min(ratio, AS_GOOD), _beyond_the_demand(brief, now))
        left = "what the demand leaves where the whole batch is one loss"
        wanted = left if scenario.limited else "asked for"
        return Score(shown, words, ratio, f"{scenario.batch_size:,} is {wanted}, a larger batch is another recipe")
    short = name == "batch_size" and negatives(scenario, now) < negatives(scenario, best)
    if ratio == 1 and not (short and best.batch_size == scenario.batch_size):
        other = name == "step" and chosen != best.step
        return Score(shown, words, 1.0, f"as good as {best.step} where {_at_best(now)}" if other else "as good as any")
    gain = f"{_word(name, getattr(best, name))} would gain {_gain(brief, now, best)}"
    if name == "step":
        gain += f" over {chosen} with {_at_best(now)}"
    return Score(shown, words, min(ratio, AS_GOOD), gain)


def _beyond_the_demand(brief: Brief, now: TrainingPlan) -> str:
    """What too large a batch leaves, and how the largest is found that leaves enough."""
    scenario = brief.scenario
    if scenario.updates:
        left = f"leaves {_many(updates(brief, now), 'update')}, {scenario.updates:,} are asked for"
        return f"{left}: at most {brief.examples:,} / {scenario.updates:,} = {scenario.batch_size:,} queries each"
    left = f"{right_among_negatives(scenario, now):.2g} right passages among a query's negatives are pushed away"
    found = f"1 + {RIGHT_AMONG_NEGATIVES:g} x {scenario.pairs - 1:,} / {scenario.right - 1}"
    return f"{left}: at most {found}, so {scenario.batch_size:,}, may share a loss"


def _at_best(plan: TrainingPlan) -> str:
    """What the best plan with a step takes: a step is judged by it."""
    if plan.chunk_size is None:
        return f"B = {plan.batch_size:,}"
    retained = f", R = {plan.retain_chunks:,}" if plan.retain_chunks else ""
    return f"C = {plan.chunk_size:,}{retained}"


def _word(name: str, value: Any) -> str:
    """A decision as the table shows it."""
    if name == "sort_by_length":
        return "sorting" if value else "file order"
    return "none" if value is None else value if isinstance(value, str) else f"{value:,}"


def _dense_does_as_well(scenario: Scenario, best: TrainingPlan, now: TrainingPlan) -> bool:
    """Whether the dense loss does as well as the best plan with a tile."""
    dense = (
        best
        if best.tile_size is None
        else best_with(scenario, step=best.step, batch_size=now.batch_size, tile_size=None)
    )
    return dense is not None and worth(scenario, dense) >= AS_GOOD * worth(scenario, now)


def _too_much(scenario: Scenario, name: str, chosen: Any, best: TrainingPlan) -> str:
    """Why a decision leaves nothing that fits."""
    tried = replace(best, **{name: chosen})
    if name in ("batch_size", "tile_size") and tried.chunk_size is not None:
        tried = replace(tried, chunk_size=min(tried.chunk_size, 4), retain_chunks=0)
    if name == "chunk_size":
        tried = replace(tried, retain_chunks=0)
    peak, over = peak_bytes(scenario, tried), peak_bytes(scenario, tried) - scenario.budget_bytes
    way_out = {
        "step": "another step would fit",
        "batch_size": f"with this step {best.batch_size:,} would fit",
        "tile_size": f"tiles of {best.tile_size or 0:,} would fit",
        "chunk_size": f"chunks of {best.chunk_size or 0:,} would fit",
        "retain_chunks": f"R = {best.retain_chunks:,} would fit",
    }
    return f"takes {format_bytes(peak)}, {format_bytes(over)} over the card: {way_out.get(name, 'nothing fits')}"


def _needless_tile(brief: Brief, best: TrainingPlan, now: TrainingPlan) -> str:
    dense = replace(now, tile_size=None)
    letter, queries = ("C", now.chunk_size) if now.step == "accumulation" else ("B", now.batch_size)
    matrix = 4 * queries**2 * (1 + brief.scenario.negatives)
    lost = hours(brief, now) - hours(brief, dense)
    return (
        f"the dense logits fit ({format_bytes(matrix)} a matrix for {letter} = {queries:,}); tiles compute them twice, "
        f"4 products for 3: {_hours(lost)} more"
    )


def _gain(brief: Brief, now: TrainingPlan, better: TrainingPlan) -> str:
    """What `better` has over `now`: negatives, hours; or no more of them than are asked for."""
    parts = []
    more = negatives(brief.scenario, better) - negatives(brief.scenario, now)
    if more > 0:
        parts.append(f"{_many(more, 'negative')} a query")
    saved = hours(brief, now) - hours(brief, better)
    if saved > 0:
        parts.append(_hours(saved))
    if not parts and negatives(brief.scenario, now) > brief.scenario.wanted_negatives:
        parts.append("a number of negatives that is nearer to the one asked for")
    return " and ".join(parts) or "less than a second"


def _hours(count: float) -> str:
    """Hours in words; less than a tenth of one in minutes, less than a minute in seconds."""
    if count >= 0.1:
        return f"{count:.1f} hours"
    if count >= 1 / 60:
        return f"{60 * count:.1f} minutes"
    return _many(round(3600 * count), "second") if count >= 0.5 / 3600 else "less than a second"


def _many(count: int, word: str) -> str:
    """1 second, 2,000 seconds."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


# --- predictions ----------------------------------------------------------------------------------------------


def judge_peak(brief: Brief, given: object, peak_gib: object) -> Score:
    """A predicted peak in GiB against the forecast: the smaller over the larger, and the mistake behind it if known."""
    try:
        plan = read_plan(brief, given)
    except (ValueError, TypeError) as error:
        return Score("peak", str(peak_gib), 0.0, f"there is no plan to predict for: {error}")
    peak = peak_bytes(brief.scenario, plan)
    mistakes = {name: value / GiB for name, value in _mistaken_peaks(brief, plan).items()}
    return _judge_number("peak", peak_gib, peak / GiB, "GiB", mistakes)


def judge_hours(brief: Brief, given: object, predicted: object) -> Score:
    """Predicted hours against the cost model's."""
    try:
        plan = read_plan(brief, given)
    except (ValueError, TypeError) as error:
        return Score("hours", str(predicted), 0.0, f"there is no plan to predict for: {error}")
    return _judge_number("hours", predicted, hours(brief, plan), "hours", _mistaken_hours(brief, plan))


def _mistaken_peaks(brief: Brief, plan: TrainingPlan) -> dict[str, float]:
    scenario, peak = brief.scenario, peak_bytes(brief.scenario, plan)
    naive = TrainingPlan("naive", plan.batch_size, plan.tile_size)
    mistakes = {
        "that is in GB (10^9 bytes); GiB are 2^30": peak * GiB / 1e9,
        "that is in MiB, of which a GiB has 1,024": 1024 * peak,
        "that is in MB (10^6 bytes); GiB are 2^30": peak * GiB / 1e6,
        "that is in bytes": peak * GiB,
        "that is the naive step's peak, which keeps every row's graph": peak_bytes(scenario, naive),
    }
    if plan.retain_chunks:
        mistakes["the graphs of the retained chunks are forgotten"] = peak_bytes(
            scenario, replace(plan, retain_chunks=0)
        )
    at_peak = forecast(scenario, plan).at_peak()
    states = sum(at_peak[kind] for kind in ("parameters", "gradients", "optimizer"))
    mistakes["parameters, gradients and AdamW's two states are forgotten"] = peak - states
    if at_peak["loss"]:
        mistakes["the logits are forgotten"] = peak - at_peak["loss"]
    if plan.tile_size is not None:
        mistakes["that is with dense logits"] = peak_bytes(scenario, replace(plan, tile_size=None))
    return mistakes


def _mistaken_hours(brief: Brief, plan: TrainingPlan) -> dict[str, float]:
    naive = hours(brief, TrainingPlan("naive", plan.batch_size, plan.tile_size))
    needed = hours(brief, plan)
    mistakes = {"that is in seconds": 3600 * needed, "that is in minutes": 60 * needed, "that is in days": needed / 24}
    mistakes["that is the naive step's time"] = naive
    mistakes["that is one update's seconds"] = seconds(brief.scenario, plan)
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
        point = ", its decimals after a point" if "," in str(given) else ""
        words = "" if given is None else str(given)[:20]
        return Score(name, words, 0.0, f"a number of {unit} above 0 is asked for{point}")
    said, share = _digits(number), min(number / truth, truth / number)
    if share >= 1 - GOOD:
        return Score(name, said, 1.0, f"forecast: {_digits(truth)} {unit}")
    for words, value in mistakes.items():
        if value > 0 and abs(number / value - 1) <= NEAR:
            return Score(name, said, share, f"forecast: {_digits(truth)} {unit}; {words}")
    return Score(name, said, share, f"forecast: {_digits(truth)} {unit}; yours is {_times(number / truth, unit)}")


def _digits(number: float) -> str:
    """Three digits of a number, and none of those before the point rounded away."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _times(ratio: float, unit: str) -> str:
    """How many times the truth a prediction is; one that is very far off looks like another unit, and is told so."""
    if 1 / 50 < ratio < 50:
        return f"{ratio:.2g} times that"
    share = f"{ratio:,.0f} times that" if ratio > 1 else "less than a fiftieth of that"
    return f"{share}, as if not in {unit}"


# --- the defence ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A sentence about a plan that a colleague might say; whether it holds, and the numbers that decide it."""

    text: str
    holds: bool
    why: str


def claims(brief: Brief, given: object) -> list[Claim]:
    """Five claims about a plan for the brief, judged by forecasts. ValueError for a plan that can't be run.

    Two or three of them hold, as the brief's seed has it, for each can be said the other way round: to grant or to deny
    them all is no defence.
    """
    plan = read_plan(brief, given)
    chunk = plan.chunk_size or min(64, plan.batch_size)
    draw = random.Random(f"claims {brief.seed}")
    holds = draw.sample([True, True, False, False, draw.random() < 0.5], 5)
    return [
        _claim_naive(brief.scenario, holds[0]),
        _claim_accumulation(brief.scenario, plan, max(1, min(chunk, plan.batch_size // 2)), holds[1]),
        _claim_half(brief.scenario, replace(plan, retain_chunks=0), holds[2]),
        _claim_logits(brief.scenario, plan.batch_size, holds[3]),
        _claim_sorted(brief, TrainingPlan("grad_cache", plan.batch_size, plan.tile_size, chunk), holds[4]),
    ]


def _claim_naive(scenario: Scenario, holds: bool) -> Claim:
    naive = TrainingPlan("naive", scenario.batch_size)
    fit = fits(scenario, naive) == holds
    said = f"{format_bytes(peak_bytes(scenario, naive))} of {format_bytes(scenario.budget_bytes)}"
    text = f"The naive step with B = {scenario.batch_size:,} would {'fit' if fit else 'be too large for'} the card."
    return Claim(text, holds, said)


def _claim_accumulation(scenario: Scenario, plan: TrainingPlan, chunk: int, holds: bool) -> Claim:
    """The passages of a chunk, or the batch's: what accumulation is taken to see."""
    few = negatives(scenario, TrainingPlan("accumulation", plan.batch_size, None, chunk))
    whole = plan.batch_size * (1 + scenario.negatives) - 1
    count = few if holds else whole
    text = f"Accumulation in chunks of {chunk:,} would hold a query of a full chunk against {_many(count, 'negative')}."
    return Claim(text, count == few, f"{few:,}, its chunk's, of the batch's {whole:,}")


def _claim_half(scenario: Scenario, plan: TrainingPlan, holds: bool) -> Claim:
    """Whether the peak goes with the batch, R being 0."""
    half = replace(plan, batch_size=max(1, plan.batch_size // 2))
    start, chunks = "Half", ""
    if plan.chunk_size is not None:
        half = replace(half, chunk_size=min(plan.chunk_size, half.batch_size))
        which = "the same chunks" if half.chunk_size == plan.chunk_size else f"chunks of {half.chunk_size:,}"
        start, chunks = "With nothing retained, half", f" in {which}"
    share = peak_bytes(scenario, half) / peak_bytes(scenario, plan)
    word = "less" if (share < 0.6) == holds else "more"
    text = f"{start} the batch{chunks} would have {word} than 60 % of the whole batch's peak."
    return Claim(text, holds, f"half has {100 * share:.0f} % of it")


def _claim_logits(scenario: Scenario, batch_size: int, holds: bool) -> Claim:
    matrix = 4 * batch_size**2 * (1 + scenario.negatives)
    word = "more" if (matrix > scenario.budget_bytes / 10) == holds else "less"
    text = f"One dense B x N matrix of float32 logits would take {word} than a tenth of what can be used."
    said = f"{format_bytes(matrix)} of {format_bytes(scenario.budget_bytes)}"
    return Claim(text, holds, said)


def _claim_sorted(brief: Brief, cached: TrainingPlan, holds: bool) -> Claim:
    ratio = hours(brief, cached) / hours(brief, replace(cached, sort_by_length=False))
    share, chunks = "at least" if (ratio <= 0.75) == holds else "less than", f"chunks of {cached.chunk_size:,}"
    text = f"Sorting by length would save gradient caching in {chunks} {share} a quarter of its time."
    return Claim(text, holds, f"it takes {100 * ratio:.0f} % of the time without")


def judge_claims(claims_made: Sequence[Claim], answers: Mapping[int, object]) -> str:
    """Each claim with what was said of it (by its place, from 1; True: it holds); if anything, the deciding numbers."""
    if not isinstance(answers, Mapping):
        return f"Answers are {ANSWERS}."
    lines, right = [], 0
    for place, claim in enumerate(claims_made, start=1):
        answer = answers.get(place)
        if not isinstance(answer, bool):
            open_still = (
                "not answered yet" if answer is None else f"not answered with True or False, but with {answer!r}"
            )
            lines.append(f"{place}. {claim.text}\n   {open_still}.")
            continue
        good = answer == claim.holds
        right += good
        truth = "holds" if claim.holds else "does not hold"
        lines.append(f"{place}. {claim.text}\n   {'right' if good else 'wrong'}: it {truth} ({claim.why}).")
    if strange := [key for key in answers if key not in range(1, len(claims_made) + 1)]:
        lines.append(f"There is no claim {', '.join(map(repr, strange))}: answers are {ANSWERS}.")
    said = sum(isinstance(answers.get(place), bool) for place in range(1, len(claims_made) + 1))
    score = f"{right} of {len(claims_made)} right." if said else "None of them is answered yet."
    return "\n".join([*lines, score])
