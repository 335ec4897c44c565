"""Tables of cases of which `make test` runs a share, and `make test-deep` all."""

import pytest


def a_share(names, rows, columns, *, one_in, kept=()):
    """Parametrize by every (row, column), in which tuples are taken apart: of each row and each column one case in so
    many runs by default. kept: columns that run in one row at least, where fewer rows than `one_in` would lose them.
    """
    assert one_in <= len(columns), "else a row would have no case by default"
    cases = []
    for number, row in enumerate(rows):
        for place, column in enumerate(columns):
            values = [each for part in (row, column) for each in (part if isinstance(part, tuple) else (part,))]
            runs = (number + place) % one_in == 0 or (column in kept and number == place % len(rows))
            marks = () if runs else pytest.mark.deep
            words = [str(value) for value in values if not isinstance(value, dict)]
            cases.append(pytest.param(*values, marks=marks, id="-".join([*words, str(place)])))
    return pytest.mark.parametrize(names, cases)
