"""The rules of readable pages, on the executed book: few numbers in a paragraph, figures early, nothing said twice.

Tables, code, formulas, captions, folded blocks and provenance do not count. The same rules hold for `smoke`, built
live, and for `full`, built from its records.
"""

import re

import nbformat
import pytest
from bs4 import BeautifulSoup

from sts.book.chapters import CHAPTERS, chapter_source

NUMERAL = re.compile(r"(?<![\w.])[-+±−]?\d[\d,]*(?:\.\d+)?%?(?!\w)")
INTERVAL = re.compile(r"[-+−]?\d[\d,.]*%?\s*(?:to|–|,)\s*[-+−]?\d[\d,.]*%?\s*[)\]]")
TEMPLATE = re.compile(r"<\|\w+\|>|<(?:start|end)_of_turn>")
ASIDE = "table, pre, figcaption, details, footer, nav, script, style, .math, .cell_input, .sts-provenance, .caption"
PAGES = [*(f"notebooks/{chapter}" for chapter in CHAPTERS), "book/introduction", "book/method"]


@pytest.fixture(scope="module", params=["smoke", "full"])
def book(request, built):
    return built(request.param).parent


def article_of(book, page):
    soup = BeautifulSoup((book / f"{page}.html").read_text(encoding="utf-8"), "html.parser")
    return soup.select_one("article")


def paragraphs(article):
    for node in article.select(ASIDE):
        node.decompose()
    found = (node for node in article.select("p, li") if node.name == "p" or not node.find("p"))
    return [text for text in (" ".join(node.get_text(" ").split()) for node in found) if text]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_read(book, page):
    article = article_of(book, page)
    figures = article.select("img, svg")
    assert len(figures) <= 8
    if figures:
        before = [
            node
            for node in figures[0].find_all_previous(["p", "li"])
            if not node.find_parent(["table", "pre", "details"])
        ]
        assert sum(len(node.get_text(" ").split()) for node in before if node in article.find_all(["p", "li"])) <= 300
    assert not TEMPLATE.findall(article.get_text(" "))
    texts = paragraphs(article)
    for text in texts:
        assert len(NUMERAL.findall(text)) <= 4 and len(INTERVAL.findall(text)) <= 1, text
    sentences = [one for text in texts for one in re.split(r"(?<=[.:!?])\s", text) if len(one.split()) >= 8]
    assert sorted({one for one in sentences if sentences.count(one) > 1}) == []


@pytest.mark.parametrize("chapter", [name for name in CHAPTERS if name != "scorecard"])
def test_a_chapter_answers_first_and_keeps_the_method_in_sight(chapter):
    cells = nbformat.read(chapter_source(chapter), 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    cards = [place for place, cell in enumerate(code) if "page.claims(" in cell.source]
    assert cards and cards[0] <= 2  # parameters, the page, the answer
    assert 1 <= len(re.findall(r'"[\w-]+"', code[cards[0]].source)) <= 4
    assert code[-1].source.strip() == "page.provenance()"
    for cell in code:
        if "assert" in cell.source:  # done by hand, and compared
            assert "hide-input" not in cell.metadata.get("tags", []) and len(cell.source.splitlines()) <= 20
    assert any("assert" in cell.source for cell in code) or chapter == "the_papers_numbers"
    headings = " ".join(
        line.lower()
        for cell in cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("#")
    )
    for heading in ("takeaways", "how sure", "exercises", "provenance"):
        assert heading in headings


def test_only_the_published_run_shows_what_is_written_about_it(book):
    shown = 0
    for chapter in CHAPTERS:
        for cell in nbformat.read(chapter_source(chapter), 4).cells:
            if "published" in cell.metadata.get("tags", []):
                assert cell.cell_type == "markdown"
                words = re.sub(r"[^\w ]", "", cell.source.splitlines()[-1])[:40]
                page = re.sub(r"[^\w ]", "", article_of(book, f"notebooks/{chapter}").get_text())
                assert (words in page) == (book.name == "full")
                shown += 1
    assert shown
