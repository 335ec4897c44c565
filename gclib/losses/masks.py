"""Rules: what a query is not pushed away from, and what it is pushed away from harder, tile by tile.

A rule holds a few numbers for each query and each passage, and makes each tile of a (B, N) mask when the tile's logits
are there. So it takes O(B) memory where a mask takes B x N, it is cut with a chunk, gathered with the passages, and
travels with them around a ring. Every loss but MaxSim takes a rule for its `mask`, and every step but the
distance's hands it on. Rules add up:
`SameIds(...) | GuideFilter(...) | HardnessWeight(...)`. No rule leaves out a query's own positive.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages; R x C the sides of a tile.
"""

import copy
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gclib.losses.directions import POSITIVES, PP, PQ, QP, QQ, Side
from gclib.support.validation import check_mask, describe, one_of, positive_number, refuse

Known = tuple[Tensor, ...]
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")


class Rule:
    """What is known of each query and its positive, (B, ...) each, and of each passage, (N, ...) each.

    `rule[queries, passages]`, two slices, is the rule of a part of the batch, as for a mask.
    """

    queries: Known = ()
    passages: Known = ()
    weighed: tuple[str, ...] = ()  # the negatives whose logits change, of in-batch and hard ones

    @property
    def weighs(self) -> bool:
        """Whether logits change, beside being left out."""
        return bool(self.weighed)

    def left_out(self, direction: str, rows: Known, columns: Known, tile: Any) -> Tensor | None:
        """(R, C) bool, True = left out of the denominator, or None; rows, columns: what is known of the tile's."""
        return None

    def weigh(self, tile: Any, logits: Tensor, temperature: float | Tensor) -> None:
        """Change a tile of query-to-passage logits, in place."""

    def check(self, queries: int, passages: int, device: torch.device) -> None:
        """ValueError where the rule is another batch's, or on another device."""
        for name, tensors, rows in (("queries", self.queries, queries), ("passages", self.passages, passages)):
            for tensor in tensors:
                if tensor.shape[0] != rows:
                    got = f"one for {tensor.shape[0]}"
                    raise refuse("mask", f"must be a rule for the {rows} {name} of the batch", got)
                if tensor.device != device:
                    raise refuse("mask", f"must be a rule on {device}", tensor.device)

    def __getitem__(self, part: tuple[slice, slice]) -> "Rule":
        queries, passages = part
        rule = copy.copy(self)
        rule.queries = tuple(tensor[queries] for tensor in self.queries)
        rule.passages = tuple(tensor[passages] for tensor in self.passages)
        return rule

    def __or__(self, other: "Rule") -> "Rule":
        return Rules((self, other))

    def __ror__(self, other: Any) -> "Rule":
        return Rules((other, self))  # a tensor's, which is refused


class SameIds(Rule):
    """Leave out what an id says is no negative.

    query_ids (B,), passage_ids (N,): ints, equal for equal texts. Passage j is left out for query i where it is
    the same passage as i's positive (another row of it, a hard negative too), or the positive of a query with i's id.
    The same holds for i's positive against passage j; query i and query k are left out for each other where they
    have one id, or positives of one id. Ids are compared, not followed: what is right by way of a third pair
    stays.

    Raises ValueError for what is no vector of ints, and for an N that is no multiple of B.
    """

    def __init__(self, query_ids: Tensor | Sequence[int], passage_ids: Tensor | Sequence[int]):
        query_ids, passage_ids = _ids("query_ids", query_ids), _ids("passage_ids", passage_ids)
        group = _group_size("passage_ids", query_ids, passage_ids)
        self.queries = query_ids, passage_ids[::group].contiguous()
        self.passages = query_ids.repeat_interleave(group), passage_ids

    def left_out(self, direction: str, rows: Known, columns: Known, tile: Any) -> Tensor:
        """Equal passage ids; beside positives and queries equal query ids too."""
        mask = rows[1].unsqueeze(1) == columns[1]
        return mask.logical_or_(rows[0].unsqueeze(1) == columns[0]) if tile.slot == 0 else mask


class GuideFilter(Rule):
    """Leave out what a guide model finds as near to the query as its positive, or nearly so: GISTEmbed.

    guide_query_reps (B, D'), guide_passage_reps (N, D'): another encoder's representations of the same texts. With s
    their cosine similarities and s_i the one of query i and its positive, passage j is left out for query i where

        s_ij > s_i - margin   (kind "absolute"),      s_ij > s_i - |s_i| margin   (kind "relative").

    Other directions compare the guide's similarity of their own two texts with the same s_i. A twin of the positive has
    s_ij = s_i up to rounding: a margin above rounding (1e-3, say) leaves it out for sure, 0 does not. Half precision is
    compared in float32. A text is never its own negative, whatever the margin; sentence-transformers leaves it out only
    where 1 is above the threshold.

    Raises ValueError for representations that don't fit, a margin that is no finite number, or another kind.
    Source: Solatorio 2024 (arXiv 2402.16829); the margins as sentence-transformers' GISTEmbedLoss has them.
    """

    def __init__(
        self, guide_query_reps: Tensor, guide_passage_reps: Tensor, *, margin: float = 0.0, kind: str = "absolute"
    ):
        for name, reps in (("guide_query_reps", guide_query_reps), ("guide_passage_reps", guide_passage_reps)):
            if not isinstance(reps, Tensor) or reps.ndim != 2 or not reps.is_floating_point():
                raise refuse(name, "must be a floating point matrix (rows, D')", _described(reps))
        if guide_query_reps.shape[1] != guide_passage_reps.shape[1]:
            rule = f"must have guide_query_reps' {guide_query_reps.shape[1]} dimensions"
            raise refuse("guide_passage_reps", rule, describe(guide_passage_reps))
        for what in ("dtype", "device"):
            if getattr(guide_passage_reps, what) != getattr(guide_query_reps, what):
                rule = f"must have guide_query_reps' {what} {getattr(guide_query_reps, what)}"
                raise refuse("guide_passage_reps", rule, getattr(guide_passage_reps, what))
        if isinstance(margin, bool) or not isinstance(margin, Real) or not math.isfinite(margin):
            raise refuse("margin", "must be a finite number", margin)
        one_of("kind", kind, ("absolute", "relative"))
        group = _group_size("guide_passage_reps", guide_query_reps, guide_passage_reps)
        dtype = torch.promote_types(guide_query_reps.dtype, torch.float32)
        reps = guide_query_reps.detach().to(dtype), guide_passage_reps.detach().to(dtype)
        queries, passages = (F.normalize(of_texts, dim=1) for of_texts in reps)
        positives = passages[::group]
        similarities = (queries * positives).sum(dim=1)
        least = similarities - margin * (similarities.abs() if kind == "relative" else 1)
        self.queries, self.passages = (queries, positives, least), (passages,)

    def left_out(self, direction: str, rows: Known, columns: Known, tile: Any) -> Tensor:
        """The guide's similarities of the tile, above what each row allows."""
        texts = rows[1] if direction in (PP, POSITIVES) else rows[0]
        with torch.autocast(texts.device.type, enabled=False):
            return texts @ columns[0].T > rows[2].unsqueeze(1)


class HardnessWeight(Rule):
    """Push harder against negatives that are more similar: strength * stop_gradient(q_i . p_j) is added to a logit.

    kind: "in_batch_negatives" weighs other queries' passages (Lan et al. 2025, arXiv 2503.04812, equation 5),
    "hard_negatives" a query's own hard negatives (arXiv 2509.20354), "all_negatives" both. Only in the direction query
    to passage, as in sentence-transformers. For unit vectors the product is the cosine similarity.

    Raises ValueError for a strength that is not above 0, or another kind.
    """

    def __init__(self, strength: float, kind: str = "in_batch_negatives"):
        self.strength, self.kind = positive_number("strength", strength), one_of("kind", kind, HARDNESS)
        self.weighed = HARDNESS[:2] if kind == "all_negatives" else (kind,)

    def weigh(self, tile: Any, logits: Tensor, temperature: float | Tensor) -> None:
        """z + strength * temperature * z, where z * temperature is the product."""
        number = temperature.detach().to(logits).reshape(()) if isinstance(temperature, Tensor) else temperature
        factor = 1 + self.strength * number
        own = logits.diagonal() if tile.own else None
        if self.kind == "hard_negatives":
            if own is not None and tile.slot > 0:
                own.mul_(factor)
            return
        unweighed = own.clone() if own is not None and (tile.slot == 0 or self.kind == "in_batch_negatives") else None
        logits.mul_(factor)
        if unweighed is not None:
            own.copy_(unweighed)


class Rules(Rule):
    """Several rules at once: left out is what any of them leaves out."""

    def __init__(self, rules: Sequence[Rule]):
        for number, rule in enumerate(rules):
            if not isinstance(rule, Rule):
                raise refuse(f"rules[{number}]", "must be a rule of gclib.losses.masks", type(rule).__name__)
        self.rules = tuple(rules)
        self.weighed = tuple(kind for rule in rules for kind in rule.weighed)
        if len(set(self.weighed)) < len(self.weighed):
            raise refuse("rules", "must weigh no negatives twice: strengths add up in one HardnessWeight", self.weighed)
        self.queries = tuple(tensor for rule in rules for tensor in rule.queries)
        self.passages = tuple(tensor for rule in rules for tensor in rule.passages)

    def left_out(self, direction: str, rows: Known, columns: Known, tile: Any) -> Tensor | None:
        """The union."""
        union = None
        of_columns = "queries" if direction == QQ else "passages"
        for rule in self.rules:
            own_rows, rows = rows[: len(rule.queries)], rows[len(rule.queries) :]
            count = len(getattr(rule, of_columns))
            own_columns, columns = columns[:count], columns[count:]
            mask = rule.left_out(direction, own_rows, own_columns, tile)
            if mask is not None:
                union = mask if union is None else union.logical_or_(mask)
        return union

    def weigh(self, tile: Any, logits: Tensor, temperature: float | Tensor) -> None:
        """One after the other."""
        for rule in self.rules:
            rule.weigh(tile, logits, temperature)


class _Matrix(Rule):
    """A whole (B, N) mask as a rule: for queries against passages alone, in one process, and not cut."""

    def __init__(self, mask: Tensor):
        self.queries = (mask,)

    def left_out(self, direction: str, rows: Known, columns: Known, tile: Any) -> Tensor | None:
        """The tile's part of the mask."""
        return rows[0][:, tile.passages] if direction == QP else None


def as_rule(mask: Any, queries: int, passages: int, device: torch.device) -> Rule | None:
    """The rule, or the (B, N) bool tensor as one, or None; ValueError for what is neither or doesn't fit the batch."""
    if isinstance(mask, Rule):
        mask.check(queries, passages, device)
        return mask
    check_mask(mask, queries, passages, device)
    return None if mask is None else _Matrix(mask)


def refuse_matrix(mask: Any) -> None:
    """A (B, N) tensor, which is one process's: the others' columns are not in it."""
    if isinstance(mask, Tensor):
        rule = "must be a rule of gclib.losses.masks (SameIds, GuideFilter) with a loss across processes"
        raise refuse("mask", rule, f"a tensor of shape {tuple(mask.shape)}")


class Restriction:
    """A rule on the rows and columns of one direction's logits."""

    # What a rule needs to know of the rows and of the columns.
    KNOWN = {
        QP: ("queries", "passages"),
        PQ: ("positives", "queries"),
        QQ: ("queries", "queries"),
        PP: ("queries", "passages"),
        POSITIVES: ("queries", "positives"),
    }

    def __init__(self, rule: Rule, direction: str, own: Side, against: Side, temperature: float | Tensor):
        self.rule, self.direction, self.temperature = rule, direction, temperature
        rows, columns = self.KNOWN[direction]
        self.rows: Known = getattr(own, rows)
        self.columns: Known = getattr(against, columns)

    def left_out(self, tile: Any) -> Tensor | None:
        """(R, C) bool or None; a query and a passage are left out alike in whichever direction they meet."""
        rows, columns = tuple(t[tile.rows] for t in self.rows), tuple(t[tile.passages] for t in self.columns)
        if self.direction == PQ:
            mask = self.rule.left_out(QP, columns, rows, tile)
            mask = None if mask is None else mask.T
        else:
            mask = self.rule.left_out(self.direction, rows, columns, tile)
        if mask is not None and tile.holds_positives and not isinstance(self.rule, _Matrix):
            mask.diagonal().fill_(False)
        return mask

    @property
    def weighs(self) -> bool:
        """Whether logits change in this direction."""
        return self.direction == QP and self.rule.weighs

    def weigh(self, tile: Any, logits: Tensor) -> None:
        """Change the tile's logits in place."""
        if self.weighs:
            self.rule.weigh(tile, logits, self.temperature)


def _ids(name: str, ids: Any) -> Tensor:
    """A vector of ints as a tensor."""
    try:
        tensor = ids if isinstance(ids, Tensor) else torch.tensor(list(ids) or [0.0])
    except (TypeError, ValueError, RuntimeError) as error:
        raise refuse(name, "must be a vector of ints below 2^63", f"what makes none: {error}") from error
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise refuse(name, "must be a vector of ints", _described(ids))
    return tensor.long()  # one type, so that any ranks and backends can exchange them


def _group_size(name: str, queries: Tensor, passages: Tensor) -> int:
    """1 + K."""
    if not queries.shape[0] or not passages.shape[0] or passages.shape[0] % queries.shape[0]:
        rule = f"must have B * (1 + K) rows, a multiple of B = {queries.shape[0]}"
        raise refuse(name, rule, f"{passages.shape[0]} rows")
    return passages.shape[0] // queries.shape[0]


def _described(value: Any) -> str:
    return describe(value) if isinstance(value, Tensor) else type(value).__name__
