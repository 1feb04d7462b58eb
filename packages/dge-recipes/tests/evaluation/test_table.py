"""The table."""

from dge_recipes.evaluation import Row, markdown_table


def test_rows_like_the_published_ones() -> None:
    table = markdown_table([Row("DeiT-Ti", 73.2, 91.8, 1.7e9, None), Row("small", 9.5, 50.0, 3_447_104.0, 1234.56)])
    assert table.splitlines() == [
        "| model | Acc@1 | Acc@5 | mean MACs | images/s |",
        "|---|---|---|---|---|",
        "| DeiT-Ti | 73.20 | 91.80 | 1.70 G | not measured |",
        "| small | 9.50 | 50.00 | 3.45 M | 1235 |",
    ]
