"""Bytes and numbers as a person reads and types them, and tables of text."""

import pytest

from gclib.support.words import format_bytes, format_table, typed_number, unit_for


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (12, "12 B"),
        (1023, "1,023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (1023 * 2**20, "1,023 MiB"),
        (11 * 2**30, "11.0 GiB"),
        (3.123 * 2**40, "3.12 TiB"),
        (-5 * 2**20, "-5.00 MiB"),
    ],
)
def test_bytes_in_words(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize("count", [float("nan"), float("inf"), None, "12", True])
def test_what_is_no_number_of_bytes_is_refused(count):
    with pytest.raises(ValueError, match="count must be a finite number of bytes"):
        format_bytes(count)


def test_the_unit_is_the_largest_that_is_filled():
    assert [unit_for(n)[0] for n in (1, 2**10, 2**20 - 1, 2**20, 2**40)] == ["B", "KiB", "KiB", "MiB", "TiB"]


def test_a_table_has_its_words_left_and_its_numbers_right():
    table = format_table(["step", "bytes"], [["naive", 12], ["cached", 1_234_567], ["none", None]])
    assert table.splitlines() == [
        "step        bytes",
        "------  ---------",
        "naive          12",
        "cached  1,234,567",
        "none            –",
    ]


@pytest.mark.parametrize(
    ("text", "number"), [("12", 12), (" 1,024 ", 1024), ("1,234.5", 1234.5), ("3 GiB", 3), ("-2e3", -2000.0)]
)
def test_a_typed_number(text, number):
    assert typed_number(text, "GiB") == number


@pytest.mark.parametrize("text", ["7,5", "1,23,456", "many", "", "3 MiB", "nan", "inf", "1_000"])
def test_what_can_not_be_read_for_sure_is_told(text):
    with pytest.raises(ValueError, match="That is not a number"):
        typed_number(text, "GiB")
