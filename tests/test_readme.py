"""The pages: tables are those of the committed results, and links lead somewhere."""

import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "result_tables.py"))
PAGES = SCRIPT["pages"]()

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(ROOT))
)


@each_page
def test_tables_agree_with_the_results(page):
    assert SCRIPT["filled"](page) == page.read_text()


def test_every_table_is_shown_on_one_page():
    texts = [page.read_text() for page in PAGES]
    shown = [name for text in texts for name in SCRIPT["MARK"].findall(text)]
    assert sorted(shown) == sorted(SCRIPT["TABLES"])


@each_page
def test_links_lead_to_files_and_headings(page):
    for target in links(page):
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if heading:
            assert heading in anchors(file), target


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def links(page):
    """The targets of a page's links and pictures within the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return [heading.replace(" ", "-") for heading in kept]


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
