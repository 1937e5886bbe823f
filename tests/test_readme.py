"""The README's tables are those of the committed results."""

import pathlib
import runpy

ROOT = pathlib.Path(__file__).parent.parent


def test_tables_agree_with_the_results():
    script = runpy.run_path(str(ROOT / "scripts" / "readme_tables.py"))
    readme = (ROOT / "README.md").read_text()
    assert script["filled"](readme) == readme


def test_files_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for part in text.split("](")[1:]:
        target = part.split(")")[0]
        assert (ROOT / target).exists(), target
