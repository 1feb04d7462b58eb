import pytest

from dge_recipes.markdown import head, line, table


def test_a_table_is_what_markdown_calls_one() -> None:
    assert table(["model", "MACs"], [["dense", "1.70 G"], ["routed", ""]]) == (
        "| model | MACs |\n|---|---|\n| dense | 1.70 G |\n| routed | |"
    )


def test_a_table_can_be_printed_line_by_line() -> None:
    rows = [("a", "1"), ("b", "2")]
    names = ("name", "number")

    assert [*head(names), *map(line, rows)] == table(names, rows).splitlines()


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows: got one of 1 cells; expected 2, one for each column"):
        table(["a", "b"], [["1"]])
