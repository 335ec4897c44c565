"""Rows that see as many examples, at rates that grow with the batch's root: `gclib.course.experiments.recipes`."""

import math

import pytest

from gclib.course.experiments.recipes import BATCH_SIZES, RECIPES, batch_recipe, scaled_rate, steps_for


@pytest.mark.parametrize("pairs", [512, 10_240, 37_409, 600])
def test_every_row_sees_the_same_number_of_examples(pairs):
    recipes = [*RECIPES, *map(batch_recipe, BATCH_SIZES)]
    assert {steps_for(pairs, 2, recipe.batch_size) * recipe.batch_size for recipe in recipes} == {
        2 * (pairs // 512) * 512
    }


@pytest.mark.parametrize(("pairs", "batch_size"), [(511, 8), (1_000, 12), (1_000, 1_024)])
def test_a_batch_that_does_not_divide_is_refused(pairs, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must divide 512.*got {batch_size}"):
        steps_for(pairs, 1, batch_size)


def test_recipes_of_a_batch_size_are_rows_of_the_table_too():
    recipes = {size: batch_recipe(size) for size in BATCH_SIZES}
    assert [recipes[8], recipes[128], recipes[512]] == [RECIPES[0], RECIPES[2], RECIPES[3]]
    for size, recipe in recipes.items():
        assert recipe.batch_size == size and (recipe.step, recipe.chunk_size) == (
            ("grad_cache", 32) if size > 32 else ("naive", None)
        )
        assert recipe.chance_loss == pytest.approx(math.log(size))
    assert RECIPES[1].chance_loss == pytest.approx(math.log(8))
    assert "rate 0.001" in batch_recipe(16, learning_rate=1e-3).name


def test_the_rate_doubles_where_the_batch_is_four_times_as_large():
    rates = [scaled_rate(size, at_128=1.0) for size in (32, 128, 512)]
    assert rates == pytest.approx([0.5, 1.0, 2.0])


def test_a_recipe_of_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size must divide 512, got 24"):
        batch_recipe(24)
