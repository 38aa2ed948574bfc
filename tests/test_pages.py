"""Sections of pages that commands write."""

import pytest

from benchmarks import pages

BEGIN, END = pages.marks("make a table")


def test_only_what_is_between_the_marks_is_rewritten() -> None:
    page = f"before\n{BEGIN}old\n{END}between\n{''.join(pages.marks('other'))}after\n"
    found = pages.rewritten(page, "make a table", "new\n")
    assert found == page.replace("old\n", "new\n")
    assert pages.rewritten(found, "make a table", "old\n") == page


@pytest.mark.parametrize(
    "page", ["no marks", f"{BEGIN}old\n", f"{BEGIN}{END}{END}", f"{END}{BEGIN}"]
)
def test_a_page_without_both_marks_is_left_alone(page: str) -> None:
    with pytest.raises(ValueError, match="not once"):
        pages.rewritten(page, "make a table", "new\n")
