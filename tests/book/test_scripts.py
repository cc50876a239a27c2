"""What scripts add to a page: a search over folded cards, and a slider; and that nothing is missing without them."""

import shutil

import pytest

from sts.book import figures
from sts.errors import ROOT


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium") or shutil.which("google-chrome")
    assert executable, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield instance
        instance.close()


@pytest.fixture
def page(tmp_path):
    cards = "".join(f'<div class="sts-latent-card">{text}</div>' for text in (
        "Latent 12 mathematics &lt;script&gt;window.hit = 1&lt;/script&gt;", "Latent 7 Code",
        "Latent 120 mathematics, code"))
    steps = figures.table([{"latent": f"times {n}", "text": f"text {n}"} for n in range(3)]).data
    path = tmp_path / "page.html"
    path.write_text(f"""<link rel="stylesheet" href="{(ROOT / 'book/_static/sts.css').as_uri()}">
        <script src="{(ROOT / 'book/_static/sts.js').as_uri()}"></script><article class="bd-article">
        <details class="sts-search" open><summary>cards</summary><div class="sts-cards">{cards}</div></details>
        <div class="sts-steps">{steps}</div></article>""")
    return path.as_uri()


def shown(tab, selector):
    return [text for text, there in tab.eval_on_selector_all(
        selector, "found => found.map(one => [one.textContent, one.offsetParent !== null])") if there]


def test_cards_are_searched_by_all_words_in_any_case(browser, page):
    tab = browser.new_page()
    tab.goto(page)
    for words, numbers in (("", [12, 7, 120]), ("MATHEMATICS", [12, 120]), ("math code", [120]), ("nothing", []),
                           ("latent 7", [7]), ("script", [12]), ("<", [12]), (" ", [12, 7, 120])):
        tab.fill("input[type=search]", words)
        assert [int(text.split()[1]) for text in shown(tab, ".sts-latent-card")] == numbers
    assert tab.evaluate("window.hit") is None
    tab.close()


def test_a_slider_shows_one_text_by_mouse_and_keys(browser, page):
    tab = browser.new_page()
    tab.goto(page)
    assert shown(tab, ".sts-steps td:last-child") == ["text 0"]
    slider = tab.locator(".sts-steps input[type=range]")
    slider.fill("2")
    assert shown(tab, ".sts-steps td:last-child") == ["text 2"] and slider.get_attribute("aria-valuetext") == "times 2"
    slider.press("ArrowLeft")
    assert shown(tab, ".sts-steps td:last-child") == ["text 1"]
    tab.close()


def test_without_scripts_all_is_there(browser, page):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(page)
    assert tab.locator(".sts-latent-card:visible").count() == tab.locator(".sts-steps tbody tr:visible").count() == 3
    assert tab.locator("input").count() == 0
    context.close()
