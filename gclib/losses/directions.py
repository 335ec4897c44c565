"""What stands against what in a contrastive loss: its directions, and whether they share one softmax.

The logit of a query and its positive is the numerator of every direction; each adds logits to the denominator, for
query i with its positive p_i:

    query_to_passage      q_i against all passages                     (always there: it holds the positive)
    passage_to_query      p_i against all queries
    query_to_query        q_i against the other queries
    passage_to_passage    p_i against the passages of other queries
    positive_to_positive  p_i against the other positives

joint: one softmax over all of them (Li et al. 2023, arXiv 2308.03281); per_direction: a loss for each, averaged, which
only the first two can have, for the others' denominators lack the positive. The names and meanings are those of
sentence-transformers (`doc` there is `passage` here); the last one is what GISTEmbed (arXiv 2402.16829) contrasts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gclib.support.validation import one_of, refuse

QP, PQ, QQ, PP, POSITIVES = (
    "query_to_passage",
    "passage_to_query",
    "query_to_query",
    "passage_to_passage",
    "positive_to_positive",
)
# The texts in the rows and in the columns of each direction's logits.
TEXTS = {
    QP: ("queries", "passages"),
    PQ: ("positives", "queries"),
    QQ: ("queries", "queries"),
    PP: ("positives", "passages"),
    POSITIVES: ("positives", "positives"),
}


@dataclass(frozen=True)
class Side:
    """One value for each kind of text of a batch or of a part of it: representations, gradients, what a rule knows."""

    queries: Any
    positives: Any
    passages: Any

    @classmethod
    def of(cls, queries: Any, passages: Any, group: int) -> "Side":
        """Of queries and passages; the positives are every (1 + K)-th passage. Tensors, tuples of them, or None."""
        if isinstance(passages, tuple):
            return cls(queries, tuple(tensor[::group] for tensor in passages), passages)
        return cls(queries, None if passages is None else passages[::group], passages)


@dataclass(frozen=True)
class Directions:
    """The directions of a loss, the first of them query_to_passage; joint: under one softmax."""

    names: tuple[str, ...] = (QP,)
    joint: bool = False

    @classmethod
    def of(cls, symmetric: bool, names: Sequence[str] | None, partition: str) -> "Directions":
        """As a loss is asked for them; ValueError for what can't be."""
        one_of("partition", partition, ("joint", "per_direction"))
        if names is None:
            return cls((QP, PQ), False) if symmetric else cls()
        if symmetric:
            raise refuse("directions", "must be None where symmetric=True names them already", names)
        if isinstance(names, str) or not set(names) <= set(TEXTS) or QP not in names or len(set(names)) < len(names):
            raise refuse("directions", f"must be {QP!r} and any others of {', '.join(map(repr, TEXTS))}, once", names)
        if partition == "per_direction" and not set(names) <= {QP, PQ}:
            rule = "must be 'joint' with directions whose own denominator lacks the positive"
            raise refuse("partition", rule, f"{partition!r} with {names!r}")
        return cls(tuple(name for name in TEXTS if name in names), partition == "joint" and len(names) > 1)

    @property
    def both(self) -> bool:
        """Whether passages are contrasted with queries as well: the columns of the logits have a sum too."""
        return PQ in self.names

    @property
    def apart(self) -> int:
        """How many softmaxes there are."""
        return 2 if self.both and not self.joint else 1

    @property
    def copies(self) -> int:
        """How often a softmax counts the positive: query to passage, and under the same sum passage to query."""
        return 2 if self.both and self.joint else 1
