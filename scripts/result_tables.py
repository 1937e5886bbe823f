"""Write the tables in all pages from benchmarks/results.

    python scripts/result_tables.py [--check]

The pages are README.md and the Markdown files under docs/. A table is between the lines
`<!-- name -->` and `<!-- /name -->`, with a name in `benchmarks.tables.TABLES`. With
--check nothing is written, and a page whose table is out of date is an error.
"""

import argparse
import pathlib
import re
import sys

from benchmarks.command_line import sentences
from benchmarks.tables import TABLES

ROOT = pathlib.Path(__file__).parent.parent

LINK = re.compile(r"\]\((?![a-z]+:|#)")
MARK = re.compile(r"<!-- (\w+) -->")


def pages() -> list[pathlib.Path]:
    """README.md and every page under docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(page: pathlib.Path) -> str:
    """The text of a page with its tables rewritten.

    Links in a table are relative to the root of the repository; they are rewritten
    relative to the page's folder.

    Raises:
        ValueError: the page has a mark without a table, or a mark that is not closed;
            or the results of a table are missing or lack a figure.
    """
    text = page.read_text()
    up = "../" * len(page.relative_to(ROOT).parent.parts)
    for name in MARK.findall(text):
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if name not in TABLES:
            raise ValueError(
                f"{page.name} has the mark {start}, but no table has that name."
            )
        before, _, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not closed:
            raise ValueError(
                f"{page.name} has the mark {start}, but not {end} after it."
            )
        try:
            table = LINK.sub(f"]({up}", TABLES[name]())
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"The table {name} of {page.name} cannot be made, because its results "
                f"lack {error}; run its benchmark again."
            ) from error
        text = f"{before}{start}\n{table}\n{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    with sentences():
        write(check)


def write(check: bool) -> None:
    """Write the pages whose tables are out of date, or, to check, name them."""
    outdated = [page for page in pages() if filled(page) != page.read_text()]
    if not check:
        for page in outdated:
            page.write_text(filled(page))
            print(f"Wrote {page.relative_to(ROOT)}.")
    elif outdated:
        names = ", ".join(str(page.relative_to(ROOT)) for page in outdated)
        sys.exit(
            f"These pages disagree with benchmarks/results: {names}. "
            "Run scripts/result_tables.py."
        )


if __name__ == "__main__":
    main()
