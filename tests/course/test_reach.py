"""What each way sees of the matrix: counted, held against the losses themselves, in words: `gclib.course.reach`."""

import pytest
import torch

from gclib import ContrastiveLoss
from gclib.course import plots
from gclib.course.banks import QueueLoss, TwoSidedBankLoss
from gclib.course.reach import ABSENT, BOTH, NEITHER, PASSAGE, QUERY, describe_reach, plot_reach, reach


def test_the_cells_of_four_pairs_by_hand():
    assert reach(4, 2, keeps="all").tolist() == [[BOTH] * 4] * 4
    nothing = [[ABSENT] * 4] * 2 + [[ABSENT, ABSENT, BOTH, BOTH]] * 2
    assert reach(4, 2, keeps="nothing").tolist() == nothing
    assert reach(4, 2, keeps="passages").tolist() == [[ABSENT] * 4] * 2 + [[QUERY, QUERY, BOTH, BOTH]] * 2
    assert reach(4, 2, keeps="passages", copied=True).tolist() == [[ABSENT] * 4] * 2 + [[QUERY] * 4] * 2
    pairs = [[NEITHER, NEITHER, PASSAGE, PASSAGE]] * 2 + [[QUERY, QUERY, BOTH, BOTH]] * 2
    assert reach(4, 2, keeps="pairs").tolist() == pairs
    assert reach(4, 4, keeps="nothing").tolist() == [[BOTH] * 4] * 4
    assert reach(2, 1, keeps="nothing", hard_negatives=1).tolist() == [[ABSENT] * 4, [ABSENT, ABSENT, BOTH, BOTH]]


@pytest.mark.parametrize(
    ("keeps", "loss_fn"),
    [
        ("passages", QueueLoss(6, 1.0)),
        ("pairs", TwoSidedBankLoss(6, ContrastiveLoss(1.0))),
        ("nothing", ContrastiveLoss(1.0)),
    ],
)
def test_a_loss_sees_as_many_passages_and_queries_as_the_picture_says(keeps, loss_fn):
    """All logits alike: the loss is the log of the passages that a query is held against."""
    reps = torch.ones(6, 3), torch.ones(6, 3)
    loss_fn(*reps)
    value = loss_fn(torch.ones(2, 3), torch.ones(2, 3))
    cells = reach(8, 2, keeps=keeps)
    assert value.exp().item() == pytest.approx((cells[2] != ABSENT).sum())


def test_the_picture_and_the_words():
    figure, axes = plots.new_figure()
    cells = reach(4, 2, keeps="pairs")
    plot_reach(axes, cells, title="bank")
    assert sorted(text.get_text() for text in axes.texts) == sorted("–" * 4 + "p" * 4 + "q" * 4 + "●" * 4)
    said = "4 in the loss, no gradient, 4 gradient to the query, 4 to the passage, 4 to both"
    assert describe_reach(cells) == f"of 16 cells {said}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 4, "chunk_size": 5, "keeps": "all"}, "chunk_size must be at most the batch"),
        ({"batch_size": 4, "chunk_size": 2, "keeps": "some"}, "keeps must be one of"),
        ({"batch_size": 0, "chunk_size": 1, "keeps": "all"}, "batch_size"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, words):
    with pytest.raises(ValueError, match=words):
        reach(**arguments)
