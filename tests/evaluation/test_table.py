"""Markdown tables."""

import pytest

from fairy2i.evaluation.table import markdown_table, number


def test_a_table_lines_up_and_aligns_numbers_right():
    assert markdown_table(["method", "ppl"], [["none", "12.34"], ["complex_phase_v2", 5]]) == (
        "| method           |   ppl |\n"
        "|------------------|------:|\n"
        "| none             | 12.34 |\n"
        "| complex_phase_v2 |     5 |"
    )


def test_a_table_without_rows_has_its_header():
    assert markdown_table(["a"], []) == "| a |\n|---|"


@pytest.mark.parametrize("row", [["one"], ["one", "two", "three"]])
def test_a_row_of_another_length_is_refused(row):
    with pytest.raises((ValueError, IndexError)):
        markdown_table(["a", "b"], [row])


@pytest.mark.parametrize(
    ("value", "shown"),
    [(3.4567, "3.46"), (999.99, "999.99"), (1000, "1,000"), (1234567.8, "1,234,568"), (float("inf"), "inf")],
)
def test_perplexities_have_two_decimals_below_a_thousand(value, shown):
    assert number(value) == shown
