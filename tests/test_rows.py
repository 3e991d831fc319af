"""The table of `tests.rows` fits the tree: what it would change is there, and so are the tests."""

import pytest

from tests.rows import MUTATIONS, ROOT, files_of, rows_in


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: f"{each.row} {each.name}")
def test_what_a_mutation_changes_is_there_once(mutation):
    text = (ROOT / mutation.path).read_text()
    assert text.count(mutation.old) == 1
    if mutation.path.endswith(".py"):
        compile(text.replace(mutation.old, mutation.new), mutation.path, "exec")
    assert mutation.new != mutation.old


@pytest.mark.parametrize("row", sorted({mutation.row for mutation in MUTATIONS}))
def test_every_row_of_the_table_has_a_test(row):
    assert files_of(row)


def test_rows_are_read_from_marks():
    source = (
        'pytestmark = pytest.mark.row("A1")\n'
        '@pytest.mark.row("B2", "B3")\n'
        "def test_one(): ...\n"
        "text = 'pytest.mark.row(\"C4\")'\n"
    )
    assert rows_in(source) == {"A1", "B2", "B3"}
