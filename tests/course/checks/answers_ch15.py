"""Answers to chapter 15, in the styles and with the mistakes of readers."""

import math

import numpy as np

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch15")
GIB = 2**30


@right("predict_peak")
def peak_in_two_moments(fixed, row, rep, batch, chunk, retained, tile):
    side = batch if tile is None else tile
    loss = retained * chunk * row + 12 * side**2
    return (fixed + 4 * batch * rep + max(loss, chunk * row)) / 2**30


@right("predict_peak")
def peak_with_or(fixed, row, rep, batch, chunk, retained, tile):
    graph = chunk * row
    return max(graph * retained + 12 * (tile or batch) ** 2, graph) / 1024**3 + (fixed + 4 * batch * rep) / 1024**3


@right("predict_peak")
def peak_of_numpy(fixed, row, rep, batch, chunk, retained, tile):
    side = float(tile if tile else batch)
    return np.max([retained * chunk * row + 12 * side * side, chunk * row]) / 2**30 + (fixed + 4 * batch * rep) / 2**30


@wrong("predict_peak", "both moments at once")
def both_moments_added(fixed, row, rep, batch, chunk, retained, tile):
    side = tile or batch
    return (fixed + 4 * batch * rep + retained * chunk * row + 12 * side**2 + chunk * row) / GIB


@wrong("predict_peak", "GB instead of GiB")
def gigabytes(fixed, row, rep, batch, chunk, retained, tile):
    return peak_in_two_moments(fixed, row, rep, batch, chunk, retained, tile) * GIB / 1e9


@wrong("predict_peak", "MiB instead of GiB")
def mebibytes(fixed, row, rep, batch, chunk, retained, tile):
    return peak_in_two_moments(fixed, row, rep, batch, chunk, retained, tile) * 1024


@wrong("predict_peak", "bytes")
def bytes_returned(fixed, row, rep, batch, chunk, retained, tile):
    return peak_in_two_moments(fixed, row, rep, batch, chunk, retained, tile) * GIB


@wrong("predict_peak", "replay forgotten")
def replay_forgotten(fixed, row, rep, batch, chunk, retained, tile):
    return (fixed + 4 * batch * rep + retained * chunk * row + 12 * (tile or batch) ** 2) / GIB


@wrong("predict_peak", "retained graphs in a replay")
def retained_in_the_replay(fixed, row, rep, batch, chunk, retained, tile):
    side = tile or batch
    graph = chunk * row
    return (fixed + 4 * batch * rep + max(retained * graph + 12 * side**2, (retained + 1) * graph)) / GIB


@wrong("predict_peak", "representations at the loss only")
def rep_inside_the_loss_only(fixed, row, rep, batch, chunk, retained, tile):
    side = tile or batch
    loss = 4 * batch * rep + retained * chunk * row + 12 * side**2
    return (fixed + max(loss, chunk * row)) / GIB


@wrong("predict_peak", "a quarter of the representations")
def rep_once(fixed, row, rep, batch, chunk, retained, tile):
    return (fixed + batch * rep + max(retained * chunk * row + 12 * (tile or batch) ** 2, chunk * row)) / GIB


@wrong("predict_peak", "cached gradients forgotten")
def rep_twice(fixed, row, rep, batch, chunk, retained, tile):
    return (fixed + 2 * batch * rep + max(retained * chunk * row + 12 * (tile or batch) ** 2, chunk * row)) / GIB


@wrong("predict_peak", "one matrix of logits")
def four_for_twelve(fixed, row, rep, batch, chunk, retained, tile):
    return (fixed + 4 * batch * rep + max(retained * chunk * row + 4 * (tile or batch) ** 2, chunk * row)) / GIB


@wrong("predict_peak", "a strip instead of a tile")
def tile_times_batch(fixed, row, rep, batch, chunk, retained, tile):
    logits = 12 * (tile or batch) * batch
    return (fixed + 4 * batch * rep + max(retained * chunk * row + logits, chunk * row)) / GIB


@wrong("predict_peak", "tile forgotten")
def always_dense(fixed, row, rep, batch, chunk, retained, tile):
    return (fixed + 4 * batch * rep + max(retained * chunk * row + 12 * batch**2, chunk * row)) / GIB


@wrong("predict_peak", "side not squared")
def side_not_squared(fixed, row, rep, batch, chunk, retained, tile):
    return (fixed + 4 * batch * rep + max(retained * chunk * row + 12 * (tile or batch), chunk * row)) / GIB


@wrong("predict_peak", "retained graphs forgotten")
def chunk_for_retained(fixed, row, rep, batch, chunk, retained, tile):
    return (fixed + 4 * batch * rep + max(retained * row + 12 * (tile or batch) ** 2, chunk * row)) / GIB


@wrong("predict_peak", "fixed bytes forgotten")
def fixed_forgotten(fixed, row, rep, batch, chunk, retained, tile):
    return (4 * batch * rep + max(retained * chunk * row + 12 * (tile or batch) ** 2, chunk * row)) / GIB


@wrong("predict_peak", None)
def logits_apart(fixed, row, rep, batch, chunk, retained, tile):
    return (fixed + 4 * batch * rep + max(retained * chunk * row, 12 * (tile or batch) ** 2, chunk * row)) / GIB


@wrong("predict_peak", None)
def logits_outside_the_maximum(fixed, row, rep, batch, chunk, retained, tile):
    return (fixed + 4 * batch * rep + 12 * (tile or batch) ** 2 + max(retained, 1) * chunk * row) / GIB


@right("predict_time")
def hours_in_order(examples, batch, naive_seconds, encoded, retained):
    updates = math.ceil(examples / batch)
    return updates * naive_seconds * encoded * (1 + (1 - retained) / 3) / 3600


@right("predict_time")
def hours_by_negative_division(examples, batch, naive_seconds, encoded, retained):
    return -(-examples // batch) * naive_seconds / 3600 * encoded * (4 - retained) / 3


@right("predict_time")
def hours_of_numpy(examples, batch, naive_seconds, encoded, retained):
    return np.ceil(examples / batch) * naive_seconds * (encoded + encoded * (1 - retained) / 3) / 60 / 60


@wrong("predict_time", "last batch lost")
def last_batch_dropped(examples, batch, naive_seconds, encoded, retained):
    return examples // batch * naive_seconds * encoded * (1 + (1 - retained) / 3) / 3600


@wrong("predict_time", "a fraction of an update")
def part_of_an_update(examples, batch, naive_seconds, encoded, retained):
    return examples / batch * naive_seconds * encoded * (1 + (1 - retained) / 3) / 3600


@wrong("predict_time", "an update too many")
def one_update_more(examples, batch, naive_seconds, encoded, retained):
    return (examples // batch + 1) * naive_seconds * encoded * (1 + (1 - retained) / 3) / 3600


@wrong("predict_time", "seconds")
def seconds(examples, batch, naive_seconds, encoded, retained):
    return hours_in_order(examples, batch, naive_seconds, encoded, retained) * 3600


@wrong("predict_time", "minutes")
def minutes(examples, batch, naive_seconds, encoded, retained):
    return hours_in_order(examples, batch, naive_seconds, encoded, retained) * 60


@wrong("predict_time", "the naive padded time")
def naive_hours(examples, batch, naive_seconds, encoded, retained):
    return math.ceil(examples / batch) * naive_seconds / 3600


@wrong("predict_time", "retained chunks forgotten")
def retained_ignored(examples, batch, naive_seconds, encoded, retained):
    return math.ceil(examples / batch) * naive_seconds * encoded * 4 / 3 / 3600


@wrong("predict_time", "padding forgotten")
def rho_ignored(examples, batch, naive_seconds, encoded, retained):
    return math.ceil(examples / batch) * naive_seconds * (1 + (1 - retained) / 3) / 3600


@wrong("predict_time", "retained share the wrong way round")
def retained_for_the_rest(examples, batch, naive_seconds, encoded, retained):
    return math.ceil(examples / batch) * naive_seconds * encoded * (1 + retained / 3) / 3600


@wrong("predict_time", "a half for a third")
def a_half_for_a_third(examples, batch, naive_seconds, encoded, retained):
    return math.ceil(examples / batch) * naive_seconds * encoded * (1 + (1 - retained) / 2) / 3600


@wrong("predict_time", "2 instead of 4/3")
def two_forwards_twice_the_time(examples, batch, naive_seconds, encoded, retained):
    return math.ceil(examples / batch) * naive_seconds * encoded * (2 - retained) / 3600


@wrong("predict_time", "rho in the second forward only")
def rho_on_the_surcharge(examples, batch, naive_seconds, encoded, retained):
    return math.ceil(examples / batch) * naive_seconds * (1 + encoded * (1 - retained) / 3) / 3600


@wrong("predict_time", "retained share added")
def sign_of_r(examples, batch, naive_seconds, encoded, retained):
    return math.ceil(examples / batch) * naive_seconds * encoded * (1 + (1 + retained) / 3) / 3600


@wrong("predict_time", "second forward subtracted")
def minus_the_surcharge(examples, batch, naive_seconds, encoded, retained):
    return math.ceil(examples / batch) * naive_seconds * encoded * (1 - (1 - retained) / 3) / 3600


@wrong("predict_time", "divided by rho")
def divided_by_rho(examples, batch, naive_seconds, encoded, retained):
    return math.ceil(examples / batch) * naive_seconds / encoded * (1 + (1 - retained) / 3) / 3600


@wrong("predict_time", "an update for each example")
def examples_for_updates(examples, batch, naive_seconds, encoded, retained):
    return examples * naive_seconds * encoded * (1 + (1 - retained) / 3) / 3600


@wrong("predict_time", "updates rounded to the nearest")
def rounded_updates(examples, batch, naive_seconds, encoded, retained):
    return round(examples / batch) * naive_seconds * encoded * (1 + (1 - retained) / 3) / 3600


def _dict(step, chunk_size, retain_chunks, tile_size):
    return {"step": step, "chunk_size": chunk_size, "retain_chunks": retain_chunks, "tile_size": tile_size}


@right("plan")
def plan_in_order(batch, budget, need):
    if need(None, 0, None) <= budget:
        return {"step": "naive", "chunk_size": None, "retain_chunks": 0, "tile_size": None}
    tile = None if need(4, 0, None) <= budget else 1024
    chunk = max(c for c in (4, 8, 16, 32, 64) if need(c, 0, tile) <= budget)
    most = 2 * math.ceil(batch / chunk)
    retained = max(r for r in range(most + 1) if need(chunk, r, tile) <= budget)
    return {"step": "grad_cache", "chunk_size": chunk, "retain_chunks": retained, "tile_size": tile}


@right("plan")
def plan_by_loops(batch, budget, need):
    if need(None, 0, None) <= budget:
        return _dict("naive", None, 0, None)
    tile = 1024 if need(4, 0, None) > budget else None
    for chunk in (64, 32, 16, 8, 4):
        if need(chunk, 0, tile) <= budget:
            break
    retained = 0
    while retained < 2 * -(-batch // chunk) and need(chunk, retained + 1, tile) <= budget:
        retained += 1
    return _dict("grad_cache", chunk, retained, tile)


@right("plan")
def plan_by_next(batch, budget, need):
    fits = lambda *asked: need(*asked) <= budget  # noqa: E731
    if fits(None, 0, None):
        return _dict("naive", None, 0, None)
    tile = None if fits(4, 0, None) else 1024
    chunk = next(c for c in [64, 32, 16, 8, 4] if fits(c, 0, tile))
    most = 2 * ((batch + chunk - 1) // chunk)
    return dict(
        retain_chunks=next(r for r in range(most, -1, -1) if fits(chunk, r, tile)),
        chunk_size=chunk,
        tile_size=tile,
        step="grad_cache",
    )


def _plan(batch, budget, need, *, naive=True, tile="needed", smallest=False, count=None, strict=False, retain=True):
    def fits(*asked):
        return need(*asked) < budget if strict else need(*asked) <= budget

    if naive and fits(None, 0, None):
        return _dict("naive", None, 0, None)
    tile = {"needed": None if fits(4, 0, None) else 1024, "always": 1024, "never": None}[tile]
    chunks = [c for c in (4, 8, 16, 32, 64) if fits(c, 0, tile)] or [4]
    chunk = min(chunks) if smallest else max(chunks)
    most = 2 * math.ceil(batch / chunk) if count is None else count(batch, chunk)
    found = max((r for r in range(most + 1) if fits(chunk, r, tile)), default=0) if retain else 0
    return _dict("grad_cache", chunk, found, tile)


@wrong("plan", "never naive")
def never_naive(batch, budget, need):
    return _plan(batch, budget, need, naive=False)


@wrong("plan", "tiles without need")
def always_tiled(batch, budget, need):
    return _plan(batch, budget, need, tile="always")


@wrong("plan", "never tiled")
def never_tiled(batch, budget, need):
    return _plan(batch, budget, need, tile="never")


@wrong("plan", "smallest chunk")
def smallest_chunk(batch, budget, need):
    return _plan(batch, budget, need, smallest=True)


@wrong("plan", "nothing retained")
def nothing_retained(batch, budget, need):
    return _plan(batch, budget, need, retain=False)


@wrong("plan", "the chunks of one tower")
def one_tower_of_chunks(batch, budget, need):
    return _plan(batch, budget, need, count=lambda B, C: math.ceil(B / C))


@wrong("plan", "chunks rounded down")
def count_rounded_down(batch, budget, need):
    return _plan(batch, budget, need, count=lambda B, C: 2 * (B // C))


@wrong("plan", "both towers cut as one")
def both_towers_rounded_together(batch, budget, need):
    return _plan(batch, budget, need, count=lambda B, C: math.ceil(2 * B / C))


@wrong("plan", "one chunk left out")
def one_chunk_too_few(batch, budget, need):
    return _plan(batch, budget, need, count=lambda B, C: 2 * math.ceil(B / C) - 1)


@wrong("plan", "exact fit refused")
def below_the_budget(batch, budget, need):
    return _plan(batch, budget, need, strict=True)


@wrong("plan", "more than there are chunks")
def unbounded_count(batch, budget, need):
    return _plan(batch, budget, need, count=lambda B, C: 1000)


@wrong("plan", None)
def tile_if_64_does_not_fit(batch, budget, need):
    if need(None, 0, None) <= budget:
        return _dict("naive", None, 0, None)
    tile = None if need(64, 0, None) <= budget else 1024
    chunk = max(c for c in (4, 8, 16, 32, 64) if need(c, 0, tile) <= budget)
    found = max(r for r in range(2 * math.ceil(batch / chunk) + 1) if need(chunk, r, tile) <= budget)
    return _dict("grad_cache", chunk, found, tile)


@wrong("plan", "smallest chunk")
def most_retained_first(batch, budget, need):
    if need(None, 0, None) <= budget:
        return _dict("naive", None, 0, None)
    tile = None if need(4, 0, None) <= budget else 1024
    fits = [
        (r, c) for c in (4, 8, 16, 32, 64) for r in range(2 * math.ceil(batch / c) + 1) if need(c, r, tile) <= budget
    ]
    retained, chunk = max(fits)
    return _dict("grad_cache", chunk, retained, tile)


@wrong("plan", "a chunk for the naive step")
def naive_keeps_a_chunk(batch, budget, need):
    if need(None, 0, None) <= budget:
        return _dict("naive", batch, 0, None)
    return _plan(batch, budget, need, naive=False)


@wrong("plan", None)
def tile_is_forgotten_for_the_chunk(batch, budget, need):
    if need(None, 0, None) <= budget:
        return _dict("naive", None, 0, None)
    tile = None if need(4, 0, None) <= budget else 1024
    chunk = max((c for c in (4, 8, 16, 32, 64) if need(c, 0, None) <= budget), default=4)
    found = max(r for r in range(2 * math.ceil(batch / chunk) + 1) if need(chunk, r, tile) <= budget)
    return _dict("grad_cache", chunk, found, tile)


@wrong("plan", "another form")
def a_tuple_of_four(batch, budget, need):
    return tuple(_plan(batch, budget, need).values())


def _sees(plan):
    return plan["chunk_size"] if plan["step"] == "accumulation" else plan["batch_size"]


@right("defend")
def defence_by_key(plans, card_gib, deadline):
    good = [i for i, p in enumerate(plans) if p["peak_bytes"] <= card_gib * 2**30 and p["hours"] <= deadline]
    return sorted(good, key=lambda i: (-_sees(plans[i]), plans[i]["hours"]))


@right("defend")
def defence_by_tuples(plans, card_gib, deadline):
    rows = []
    for place, plan in enumerate(plans):
        if plan["peak_bytes"] / 2**30 > card_gib or plan["hours"] > deadline:
            continue
        seen = plan["chunk_size"] if plan["step"] == "accumulation" else plan["batch_size"]
        rows.append((1 - seen, plan["hours"], place))
    return [place for *_, place in sorted(rows)]


@right("defend")
def defence_by_two_sorts(plans, card_gib, deadline):
    places = list(range(len(plans)))
    places.sort(key=lambda i: plans[i]["hours"])
    places.sort(key=lambda i: _sees(plans[i]), reverse=True)
    return [i for i in places if plans[i]["peak_bytes"] <= card_gib * GIB and plans[i]["hours"] <= deadline]


@right("defend")
def defence_of_numpy(plans, card_gib, deadline):
    order = np.lexsort(([p["hours"] for p in plans], [-_sees(p) for p in plans]))
    return [i for i in order if plans[i]["peak_bytes"] <= card_gib * GIB and plans[i]["hours"] <= deadline]


def _defend(plans, card, deadline, key, *, memory=True, time=True, strict=False):
    def allowed(plan):
        fits = plan["peak_bytes"] < card if strict else plan["peak_bytes"] <= card
        kept = plan["hours"] < deadline if strict else plan["hours"] <= deadline
        return (fits or not memory) and (kept or not time)

    return sorted((i for i, p in enumerate(plans) if allowed(p)), key=lambda i: key(plans[i]))


def _best(plan):
    return (-_sees(plan), plan["hours"])


@wrong("defend", "accumulation's batch taken for its negatives")
def accumulation_by_its_batch(plans, card_gib, deadline):
    return _defend(plans, card_gib * GIB, deadline, lambda p: (-p["batch_size"], p["hours"]))


@wrong("defend", "GB instead of GiB")
def gigabytes_of_the_card(plans, card_gib, deadline):
    return _defend(plans, card_gib * 1e9, deadline, _best)


@wrong("defend", "memory not checked")
def memory_forgotten(plans, card_gib, deadline):
    return _defend(plans, card_gib * GIB, deadline, _best, memory=False)


@wrong("defend", "deadline not checked")
def deadline_forgotten(plans, card_gib, deadline):
    return _defend(plans, card_gib * GIB, deadline, _best, time=False)


@wrong("defend", "the fastest first")
def fastest_first(plans, card_gib, deadline):
    return _defend(plans, card_gib * GIB, deadline, lambda p: p["hours"])


@wrong("defend", "the slower of equals first")
def slower_of_equals_first(plans, card_gib, deadline):
    return _defend(plans, card_gib * GIB, deadline, lambda p: (-_sees(p), -p["hours"]))


@wrong("defend", "the fewest negatives first")
def fewest_first(plans, card_gib, deadline):
    return _defend(plans, card_gib * GIB, deadline, lambda p: (_sees(p), p["hours"]))


@wrong("defend", "the slower of equals first")
def reversed_pairs(plans, card_gib, deadline):
    return _defend(plans, card_gib * GIB, deadline, lambda p: (_sees(p), p["hours"]))[::-1]


@wrong("defend", "equals as they stand")
def ties_as_they_stand(plans, card_gib, deadline):
    return _defend(plans, card_gib * GIB, deadline, lambda p: -_sees(p))


@wrong("defend", "not in order")
def not_sorted(plans, card_gib, deadline):
    return _defend(plans, card_gib * GIB, deadline, lambda p: 0)


@wrong("defend", "exact fit refused")
def strictly_within(plans, card_gib, deadline):
    return _defend(plans, card_gib * GIB, deadline, _best, strict=True)


@wrong("defend", "the cached step's chunk taken for its negatives")
def every_chunk_counts(plans, card_gib, deadline):
    return _defend(plans, card_gib * GIB, deadline, lambda p: (-(p["chunk_size"] or p["batch_size"]), p["hours"]))


@wrong("defend", "another form")
def plans_for_places(plans, card_gib, deadline):
    return [plans[i] for i in _defend(plans, card_gib * GIB, deadline, _best)]


@wrong("defend", "the best alone")
def best_only(plans, card_gib, deadline):
    return _defend(plans, card_gib * GIB, deadline, _best)[:1]


@wrong("defend", "accumulation struck out")
def accumulation_left_out(plans, card_gib, deadline):
    return [i for i in _defend(plans, card_gib * GIB, deadline, _best) if plans[i]["step"] != "accumulation"]


@wrong("defend", "places among the survivors")
def places_in_the_filtered_list(plans, card_gib, deadline):
    good = [p for p in plans if p["peak_bytes"] <= card_gib * GIB and p["hours"] <= deadline]
    return sorted(range(len(good)), key=lambda i: _best(good[i]))


@wrong("defend", "bytes against GiB")
def card_in_bytes(plans, card_gib, deadline):
    return _defend(plans, card_gib, deadline, _best)


@wrong("defend", "another form")
def one_best_place(plans, card_gib, deadline):
    found = _defend(plans, card_gib * GIB, deadline, _best)
    return found[0] if found else None


@wrong("defend", "input changed in place")
def sorted_in_place(plans, card_gib, deadline):
    plans.sort(key=_best)
    return [i for i, p in enumerate(plans) if p["peak_bytes"] <= card_gib * GIB and p["hours"] <= deadline]
