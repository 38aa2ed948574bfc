"""What comes from models and users stays text in Markdown.

Read by a real parser that lets HTML through.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.hostile import HOSTILE, write_hostile_bundle
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.report import build, card, markdown, sources
from thanos_deploy.report.escape import code, code_block, literal, quote

PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")

texts = st.text(
    st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1
).filter(str.strip)


def tokens_of(markdown_text: str) -> Iterator[Token]:
    for token in PARSER.parse(markdown_text):
        yield token
        yield from token.children or ()


def words(text: str) -> str:
    return "".join(text.split())


@given(texts)
def test_a_literal_text_is_read_back_as_it_was(text: str) -> None:
    found = [token for token in tokens_of(f"The text {literal(text)}") if token.type == "text"]
    assert words("".join(token.content for token in found)) == words(f"The text {text}")
    assert {token.type for token in tokens_of(f"x {literal(text)}")} <= {
        "paragraph_open", "paragraph_close", "inline", "text",
    }  # fmt: skip


@given(texts)
def test_code_holds_what_it_was_given(text: str) -> None:
    (found,) = [
        token for token in tokens_of(f"run {code(text)} now") if token.type == "code_inline"
    ]
    assert words(found.content) == words(text)


@given(st.lists(texts, min_size=1).map("\n".join))
def test_no_line_leaves_a_quotation_or_a_block_of_code(text: str) -> None:
    quoted = [token.type for token in PARSER.parse(quote(text)) if token.level == 0]
    assert quoted == ["blockquote_open", "blockquote_close"]
    assert not {"html_block", "html_inline", "link_open", "image"} & {
        token.type for token in tokens_of(quote(text))
    }
    (block,) = PARSER.parse(f"A paragraph.\n\n{code_block('x' + text)}")[3:]
    assert block.type == "code_block"


@pytest.mark.parametrize("what", ["card", "report"])
def test_a_hostile_bundle_brings_no_markup(what: str, tmp_path: Path) -> None:
    report = build.build([sources.read(Bundle.open(write_hostile_bundle(tmp_path / "out")))])
    text = card.write(report) if what == "card" else markdown.render(report)
    found = list(tokens_of(text))
    assert not [token for token in found if token.type in ("html_block", "html_inline", "image")]
    assert not [token for token in found if token.type == "link_open"]
    shown = words("".join(token.content for token in found if token.type == "text"))
    assert shown.count(words(HOSTILE)) >= 4
