"""Sources: which files are found, under which names, and what is told of the rest."""

import glob
import hashlib
import logging
import os
import zipfile

import pytest
from corpora import config, contents, refuse

from jaxlab.data import CorpusConfig, build, open_corpus

ASK = pytest.mark.parametrize("ask", ["{}", "{}/**", "{}/**/*"])


def write(root, **texts):
    """Write files below a directory; "__" in a name stands for a slash."""
    for name, text in texts.items():
        path = root / f"{name.replace('__', '/')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def names(corpus):
    return sorted(file["name"] for file in corpus.manifest["files"])


def test_globs_and_named_files(tmp_path, texts):
    root, expected = texts
    corpus = build(config(tmp_path, root / "a" / "*1*.txt", root / "b" / "file3.txt"))
    # Names are relative to where the glob begins, and a named file is its own name.
    wanted = [n for n in expected if n.startswith("a/") and "1" in n]
    assert contents(corpus) == sorted(expected[n] for n in wanted + ["b/file3.txt"])
    assert names(corpus) == sorted(
        [n.removeprefix("a/") for n in wanted] + ["file3.txt"]
    )
    deep = CorpusConfig(
        directory=str(tmp_path / "deep"), sources=(str(root / "**" / "*.txt"),)
    )
    assert contents(build(deep)) == sorted(expected.values())


@pytest.mark.parametrize(
    "pattern",
    ["*", "**", "*/*", "**/*", "**/c/*", "a/**/*.txt", "**/.h/*", "**/**/?.txt", "?/**"]
    + ["**/b/**", "**.txt", ".*/**/*", "a/b/../*.txt"],
)
def test_a_glob_finds_what_python_does(tmp_path, pattern, monkeypatch):
    root = write(tmp_path / "in", x="x", a__x="ax", a__b__y="aby", a__b__c__z="abcz")
    write(root, a__b="a file", h__c__z="hcz", **{".h__z": "hidden", "a__.g__w": "agw"})
    monkeypatch.chdir(root)
    found = [
        path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)
    ]
    corpus = build(config(tmp_path, pattern))
    inputs = {os.path.normpath(path) for path in corpus.manifest["inputs"]}
    assert inputs == {os.path.normpath(path) for path in found} != set()


def test_missing_sources(tmp_path):
    refuse(tmp_path, FileNotFoundError, "no file or directory", tmp_path / "gone.txt")
    refuse(tmp_path, FileNotFoundError, "No file matches", tmp_path / "*.txt")
    (tmp_path / "data.csv").write_text("a,b")
    refuse(tmp_path, ValueError, "unknown extension '.csv'", tmp_path / "data.csv")
    (tmp_path / "data.zip.gz").write_text("a,b")
    refuse(
        tmp_path, ValueError, "unknown extension '.zip.gz'", tmp_path / "data.zip.gz"
    )
    refuse(tmp_path, ValueError, "None of the files", tmp_path / "*.csv")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, ValueError, "None of the files", tmp_path / "empty")
    (tmp_path / "link.txt").symlink_to("link.txt")
    refuse(tmp_path, FileNotFoundError, "no file or directory", tmp_path / "link.txt")
    with pytest.raises(FileNotFoundError, match="holds no corpus"):
        open_corpus(str(tmp_path / "corpus"))


def test_a_file_that_two_sources_name_is_read_once(tmp_path):
    text = tmp_path / "text"
    (text / "sub").mkdir(parents=True)
    for i in range(5):
        (text / "sub" / f"{i}.md").write_text(f"text {i}")
    sources = (str(text), str(text / "sub" / "*.md"))
    corpus = build(CorpusConfig(directory=str(tmp_path / "corpus"), sources=sources))
    assert len(corpus.split("train")) + len(corpus.split("heldout")) == 5


# Names --------------------------------------------------------------------------------


def test_names_that_are_not_utf8(tmp_path, caplog):
    root = write(tmp_path / "in", plain="plain", café="café")
    latin = [
        os.fsdecode(name) for name in (b"caf\xe9.txt", b"d\xff/\xfe.txt", b"\xe9.txt")
    ]
    (root / os.fsdecode(b"d\xff")).mkdir()
    for name in latin:
        try:
            (root / name).write_text(f"text of {name!r}")
        except OSError:
            pytest.skip("this disk takes only names of UTF-8")
    (root / os.fsdecode(b"bad\xe9.txt")).write_bytes(b"\xff")
    cfg = config(tmp_path, root, root / latin[0], heldout_fraction=0.4)
    corpus = build(cfg)
    assert contents(corpus) == sorted(
        ["plain", "café", *(f"text of {n!r}" for n in latin)]
    )
    assert names(corpus) == sorted(["plain.txt", "café.txt", *latin])
    assert open_corpus(cfg.directory).manifest == corpus.manifest == build(cfg).manifest
    assert (tmp_path / "corpus" / "manifest.json").read_bytes().isascii()
    # Every name is hashed as the bytes that it is on disk.
    for file in corpus.manifest["files"]:
        digest = hashlib.sha256(os.fsencode(file["name"])).digest()
        held_out = int.from_bytes(digest[:8]) / 2**64 < 0.4
        assert file["split"] == ("heldout" if held_out else "train")
    assert len({file["split"] for file in corpus.manifest["files"]}) == 2
    # What is told can be printed.
    assert [r.message for r in caplog.records] == [
        r"Skipped 1 file, not text: 'bad\udce9.txt'"
    ]
    (root / os.fsdecode(b"z\xe9.jsonl")).write_text("{")
    with pytest.raises(ValueError, match=r"z\\udce9.jsonl' line 1 is not JSON"):
        build(config(tmp_path / "other", root))


def test_suffixes_in_capitals(tmp_path):
    root = write(tmp_path / "in", a="text")
    (root / "B.TXT").write_text("loud")
    (root / "C.Jsonl").write_text('{"text": "row"}')
    with zipfile.ZipFile(root / "D.ZIP", "w") as archive:
        archive.writestr("E.MD", "zipped")
    assert contents(build(config(tmp_path, root))) == ["loud", "row", "text", "zipped"]


@pytest.mark.parametrize(
    "pattern, found",
    [
        ("data [v2]/*.txt", ["1.txt", "2.txt"]),
        ("data [v2]/**/*.txt", ["1.txt", "2.txt", "sub/3.txt"]),
        ("data [v2]/[12].txt", ["1.txt", "2.txt"]),
        ("data [v2]", ["1.txt", "2.txt", "sub/3.txt"]),
        ("data ?v2?/*.txt", ["data [v2]/1.txt", "data [v2]/2.txt"]),
        ("data [vw]/*.txt", ["data v/5.txt"]),
        ("*/4[[]?].txt", ["more/4[*].txt"]),
        ("more/4[*].txt", ["4[*].txt"]),
    ],
)
def test_magic_characters_in_a_part_that_exists(tmp_path, pattern, found, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data [v2]", **{"1": "1", "2": "2", "sub__3": "3"})
    write(tmp_path, **{"more__4[*]": "4", "more__4a": "4a", "data v__5": "5"})
    assert names(build(config(tmp_path, pattern))) == found


# Links --------------------------------------------------------------------------------


@ASK
def test_links_to_directories_are_followed(tmp_path, ask, caplog):
    root = write(tmp_path / "in", a="a", sub__b="b")
    write(tmp_path / "elsewhere", c="c", deep__d="d")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "file.txt").symlink_to(tmp_path / "elsewhere" / "deep" / "d.txt")
    corpus = build(config(tmp_path, ask.format(root)))
    assert contents(corpus) == list("abcd")
    assert {"a.txt", "sub/b.txt", "link/c.txt"} < set(names(corpus))
    assert caplog.records == []


def test_a_file_has_the_name_that_no_link_leads_to(tmp_path):
    root = write(tmp_path / "in", real__x="x", real__sub__y="y")
    (root / "alias").symlink_to("real")
    (root / "real" / "again").symlink_to("sub")
    assert names(build(config(tmp_path, root))) == ["real/sub/y.txt", "real/x.txt"]


@ASK
def test_loops_are_left_out_and_told(tmp_path, ask, caplog):
    root = write(tmp_path / "in", a="a", sub__b="b", sub__deep__c="c")
    (root / "sub" / "up").symlink_to("..")
    (root / "sub" / "deep" / "self").symlink_to(".")
    (root / "sub" / "deep" / "over").symlink_to(root / "sub")
    (root / "x").symlink_to("y")
    (root / "y").symlink_to("x")
    corpus = build(config(tmp_path, ask.format(root)))
    assert contents(corpus) == list("abc")
    assert names(corpus) == ["a.txt", "sub/b.txt", "sub/deep/c.txt"]
    told = sorted(record.message for record in caplog.records)
    assert told == [
        "Left out links that lead back to a directory above them: "
        f"'{root}/sub/deep/over', '{root}/sub/deep/self', '{root}/sub/up'",
        f"Left out links that lead nowhere: '{root}/x', '{root}/y'",
    ]


def test_links_that_lead_nowhere_are_told(tmp_path, caplog):
    root = write(tmp_path / "in", a="a", b="b")
    for i in range(10):
        (root / f"gone{i}.txt").symlink_to(tmp_path / "gone")
    corpus = build(config(tmp_path, root, root / "*.txt"))
    assert contents(corpus) == ["a", "b"]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    shown = ", ".join(f"'{root}/gone{i}.txt'" for i in range(8))
    assert record.message == f"Left out links that lead nowhere: {shown}, and 2 more"


def test_directories_that_may_not_be_read_are_told(tmp_path, caplog, monkeypatch):
    root = write(tmp_path / "in", a="a", b="b", closed__c="c")
    allowed = os.access  # root may read everything
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != root / "closed" and allowed(path, mode)
    )
    assert contents(build(config(tmp_path, root))) == ["a", "b"]
    assert [record.message for record in caplog.records] == [
        f"Left out directories without the permission to read them: '{root}/closed'"
    ]


# What is left out ---------------------------------------------------------------------


def test_other_files_are_left_out_and_counted(tmp_path, caplog):
    root = write(tmp_path / "in", a="a", b="b")
    (root / "sub").mkdir()
    others = ("1.pdf", "sub/2.PDF", "3.html", "Makefile", ".env", "t.tar.gz")
    for name in (*others, "u.csv.ZST"):
        (root / name).write_text("other")
    inner = tmp_path / "inner.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("text.txt", "too deep")
    with zipfile.ZipFile(root / "c.zip", "w") as archive:
        archive.writestr("c.txt", "c")
        archive.writestr("4.pdf", "other")
        archive.write(inner, "inner.zip")
    with zipfile.ZipFile(root / "d.zip", "w") as archive:
        archive.writestr("5.pdf", "other")
    # Two sources hold the same files, which count once.
    corpus = build(config(tmp_path, root, root / "*"))
    assert contents(corpus) == ["a", "b", "c"]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        "Left out 10 files that a corpus does not read: 4 .pdf, 2 without a suffix, "
        "1 .html, 1 .zip, 1 .tar.gz, 1 .csv.zst (it reads .txt, .py, .md, .json, "
        ".jsonl, .parquet, each also as .gz, .bz2, .xz, .zst, and .zip archives of "
        "them)"
    )
    caplog.clear()
    build(config(tmp_path, root, root / "*"))  # nothing new to say when it is opened
    assert caplog.records == []
    refuse(
        tmp_path / "no", ValueError, r"None of the files of '.*d\.zip'", root / "d.zip"
    )


def test_many_suffixes_are_told_shortly(tmp_path, caplog):
    root = write(tmp_path / "in", a="a", b="b")
    for i in range(20):
        (root / f"x.{i:03}").write_text("other")
    (root / os.fsdecode(b"x.caf\xe9\n")).write_text("other")
    build(config(tmp_path, root))
    [record] = caplog.records
    assert "Left out 21 files" in record.message and ", and 13 more (" in record.message
    assert record.message.isprintable()
