"""The lab that hides its steps' names: driven as a reader does, by values and clicks."""

import pytest
import torch
from helpers.oracles import InfoNCE, TinyEncoder, token_batch

from gclib import ContrastiveLoss
from gclib.course.widgets.audit import NOTHING, AuditLab
from gclib.course.wild.traps import TRAPS


@pytest.fixture(scope="module")
def lab():
    generator = torch.Generator().manual_seed(3)
    batch = token_batch(9, 6, generator), token_batch(9, 6, generator)
    torch.manual_seed(0)
    encoder = TinyEncoder(0.3)
    return AuditLab([encoder, encoder], batch, InfoNCE())


def test_every_step_can_be_guessed_and_a_wrong_guess_is_told_by_a_number(lab):
    rights = []
    for _, number in lab.step.options:
        lab.step.value = number
        answers = []
        for name in lab.guess.options:
            lab.guess.value = name
            lab.tell.click()
            answers.append((name, "Yes: " in lab.status.value))
            true = lab._steps[number].name
            assert name == true or true not in lab.status.value and " would be " in lab.status.value
        rights += [name for name, yes in answers if yes]
        assert sum(yes for _, yes in answers) == 1
    assert sorted(rights) == sorted([NOTHING, *(trap.name for trap in TRAPS)])


def test_the_names_stand_nowhere_before_the_guess(lab):
    for _, number in lab.step.options:
        lab.step.value = number
        shown = lab.words.value + lab.status.value + lab.table()
        assert not any(trap.name in shown for trap in TRAPS)


def test_a_factor_b_follows_the_slider_and_the_ends_of_it_work(lab):
    for rows in (lab.rows.min, lab.rows.max):
        lab.rows.value = rows
        assert lab.report().batch == (rows, rows)
        assert f"{rows}.000" in lab.table()
    lab.rows.value = 7
    assert 'aria-live="polite"' in lab.words.value


def test_a_loss_without_a_temperature_and_too_few_rows():
    generator = torch.Generator().manual_seed(3)
    batch = token_batch(5, 6, generator), token_batch(5, 6, generator)
    encoder = TinyEncoder()
    assert "–" in AuditLab([encoder, encoder], batch, ContrastiveLoss(0.5)).table()
    with pytest.raises(ValueError, match="inputs must have at least 5 rows"):
        AuditLab([encoder, encoder], [token_batch(4, 6, generator)] * 2, ContrastiveLoss(0.5))
