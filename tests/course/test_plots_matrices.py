"""Matrices of logits and lines over the batch size: what is drawn matches the numbers; bad shapes are refused."""

import numpy as np
import pytest
import torch

from gclib.course import plots


def test_positives_are_outlined_and_masked_cells_crossed():
    figure, axes = plots.new_figure()
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[1, 5] = mask[2, 0] = True
    plots.plot_logits(axes, torch.rand(3, 9), mask=mask, limits=(0, 1), title="rows")
    assert [patch.get_xy() for patch in axes.patches] == [(-0.5, -0.5), (2.5, 0.5), (5.5, 1.5)]
    assert [text.get_position() for text in axes.texts] == [(5, 1), (0, 2)]
    assert axes.images[0].get_clim() == (0, 1) and len(figure.axes) == 2


def test_limits_are_those_of_the_values_unless_given():
    _, axes = plots.new_figure()
    plots.plot_logits(axes, np.array([[1.0, -2.0], [0.0, 3.0]]), colorbar=False)
    assert axes.images[0].get_clim() == (-2, 3) and len(axes.figure.axes) == 1


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0), (4, 2)])
def test_a_matrix_without_whole_groups_is_refused(shape):
    with pytest.raises(ValueError, match="^values must be a matrix"):
        plots.plot_logits(plots.new_figure()[1], np.zeros(shape))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="^mask must have the shape"):
        plots.plot_logits(plots.new_figure()[1], np.zeros((2, 2)), mask=np.zeros((2, 4), dtype=bool))


def test_lines_over_the_batch_size_are_named_at_their_ends_without_overlap():
    _, axes = plots.new_figure()
    sizes = [8, 64, 512]
    plots.plot_by_batch_size(axes, sizes, {"a": [1, 2, 3.0], "b": [1, 2, 3.01], "c": [0, 0, 0]}, label="nats")
    assert [text.get_text() for text in axes.texts] == ["c", "a", "b"]
    heights = [text.xy[1] for text in axes.texts]
    assert min(np.diff(heights)) > 0.15
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "64", "512"]
    assert axes.lines[1].get_ydata().tolist() == [1, 2, 3.01]


def test_a_picture_as_html_carries_its_words():
    figure, _ = plots.new_figure()
    assert plots.to_html(figure, 'five "quoted" words & more').startswith(
        '<img alt="five &quot;quoted&quot; words &amp; m'
    )
    with pytest.raises(ValueError, match="^alt must"):
        plots.to_html(figure, "short")
