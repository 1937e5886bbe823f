"""Write the README's tables from benchmarks/results: python scripts/readme_tables.py.

With --check nothing is written, and a README that disagrees is an error.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.tables import TABLES  # noqa: E402


def filled(readme: str) -> str:
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if start not in readme:
            continue
        before, _, rest = readme.partition(start)
        _, _, after = rest.partition(end)
        readme = f"{before}{start}\n{make()}\n{end}{after}"
    return readme


def main() -> None:
    path = ROOT / "README.md"
    readme = path.read_text()
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    if "--check" not in sys.argv:
        path.write_text(filled(readme))
    elif filled(readme) != readme:
        sys.exit("README.md disagrees with benchmarks/results; run this script.")


if __name__ == "__main__":
    main()
