"""Reading: every format and compression, rows, and what is damaged."""

import bz2
import gzip
import io
import json
import logging
import lzma
import sys
import zipfile

import pytest
from corpora import config, contents, refuse

from jaxlab.data import build


def zstd(data, **parameters):
    zstandard = pytest.importorskip("zstandard")
    settings = zstandard.ZstdCompressionParameters.from_level(
        3, write_checksum=True, **parameters
    )
    return zstandard.ZstdCompressor(compression_params=settings).compress(data)


def parquet(columns, **kwargs):
    """The bytes of a parquet file."""
    pyarrow = pytest.importorskip("pyarrow")
    written = pytest.importorskip("pyarrow.parquet")
    stream = io.BytesIO()
    written.write_table(pyarrow.table(columns), stream, **kwargs)
    return stream.getvalue()


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
COMPRESSIONS = pytest.mark.parametrize("suffix", COMPRESS)


def test_all_formats(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.md").write_text("markdown")
    (root / "b.py").write_text("print('é')")
    (root / "c.txt.gz").write_bytes(gzip.compress(b"compressed"))
    rows = [{"text": "row one", "id": 1}, {"text": ""}, {"text": "row\ntwo"}]
    lines = "\n\n".join(map(json.dumps, rows))
    (root / "d.jsonl").write_text(lines)
    (root / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "\\u00e9\\u0000"}'))
    table = parquet({"text": ["cell one", "cell two"], "other": [1, 2]})
    (root / "f.parquet").write_bytes(table)
    with zipfile.ZipFile(root / "g.zip", "w") as archive:
        archive.writestr("inner/h.txt", "zipped")
        archive.writestr("inner/i.jsonl", '{"text": "zipped row"}')
        archive.writestr("inner/j.png", b"\x89PNG")
        archive.write(root / "f.parquet", "k.parquet")
    (root / "ignored.csv").write_text("no,text")
    (root / "empty.txt").write_text("")
    corpus = build(config(tmp_path, root))
    assert contents(corpus) == sorted(
        ["markdown", "print('é')", "compressed", "row one", "row\ntwo", "é\0"]
        + ["cell one", "cell two"] * 2
        + ["zipped", "zipped row"]
    )
    names = [f["name"] for f in corpus.manifest["files"]]
    assert "g.zip/inner/h.txt" in names and "empty.txt" not in names


def test_empty_corpora(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n\n')
    (tmp_path / "c.json").write_text(" \n")
    (tmp_path / "d.json").write_text("[]")
    (tmp_path / "e.txt.zst").write_text("")
    refuse(tmp_path, ValueError, "corpus is empty: of 1 files", tmp_path / "a.txt")
    refuse(tmp_path, ValueError, "of 5 files 5 hold no text", tmp_path)
    (tmp_path / "f.json").write_text('{"name": "x"}')
    message = 'of 6 files 5 hold no text and 1 are not text.*f.json.*they have "name"'
    refuse(tmp_path, ValueError, message, tmp_path)


BAD_TEXT = [
    (b"abc\xff", r"byte 3 \(0xff\) is not valid UTF-8"),
    (b"caf\xe9 au lait", r"byte 3 \(0xe9\)"),
    (b"ab\0c", "byte 2 is NUL"),
]


@pytest.mark.parametrize("data, message", BAD_TEXT)
def test_files_that_are_not_text(tmp_path, texts, caplog, data, message):
    bad = texts[0] / "bad.txt"
    bad.write_bytes(data)
    refuse(tmp_path, ValueError, rf"bad\.txt' is not text: {message}", bad)
    with caplog.at_level(logging.WARNING):
        corpus = build(config(tmp_path, texts[0]))
    assert [r.message for r in caplog.records] == [
        "Skipped 1 file, not text: 'bad.txt'"
    ]
    assert [s["name"] for s in corpus.manifest["skipped"]] == ["bad.txt"]
    assert contents(corpus) == sorted(texts[1].values())


# Compression --------------------------------------------------------------------------


@COMPRESSIONS
def test_every_format_may_be_compressed(tmp_path, suffix):
    data = {
        "a.txt": "wie schön\n".encode() * 3,
        "b.jsonl": b'{"text": "line one"}\n{"text": "line two"}',
        "c.json": b'[{"text": "row"}]',
        "d.parquet": parquet({"text": ["cell one", "cell two"]}),
    }
    root = tmp_path / "in"
    root.mkdir()
    with zipfile.ZipFile(root / "e.zip", "w", zipfile.ZIP_LZMA) as archive:
        for name, content in data.items():
            compressed = COMPRESS[suffix](content)
            (root / f"{name}{suffix.upper()}").write_bytes(compressed)
            archive.writestr(f"inner/{name}{suffix}", compressed)
    once = ["wie schön\n" * 3, "line one", "line two", "row", "cell one", "cell two"]
    assert contents(build(config(tmp_path, root))) == sorted(once * 2)


@COMPRESSIONS
def test_streams_may_follow_one_another(tmp_path, suffix):
    """As `cat` joins them, and as parallel compressors write."""
    parts = [COMPRESS[suffix](part) for part in (b"one ", b"", b"two ", b"x" * 300_000)]
    (tmp_path / f"a.txt{suffix}").write_bytes(b"".join(parts))
    (tmp_path / "b.txt").write_text("b")
    corpus = build(config(tmp_path, tmp_path / "*.txt*"))
    assert contents(corpus) == ["b", "one two " + "x" * 300_000]


TEXT = "".join(f"{i} green bottles, {i * i % 97} left\n" for i in range(3000)).encode()


@COMPRESSIONS
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:3],
        lambda data: b"plain text that somebody named so",
        lambda data: data[:1000] + bytes([data[1000] ^ 255]) + data[1001:],
        lambda data: data + data[: len(data) // 2],
    ],
    ids=["half", "all but one byte", "three bytes", "plain", "flipped", "second half"],
)
def test_damaged_compressed_files(tmp_path, suffix, damage):
    data = damage(COMPRESS[suffix](TEXT))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data)
    refuse(tmp_path, ValueError, rf"a\.txt{suffix}' cannot be decompressed \(", path)
    rows = tmp_path / f"a.jsonl{suffix}"
    line = json.dumps({"text": TEXT.decode()}).encode() + b"\n"
    rows.write_bytes(damage(COMPRESS[suffix](line)))
    # Some damage is noticed only behind the line that it is in.
    message = rf"a\.jsonl{suffix}' (cannot be decompressed|line 1 is not JSON)"
    refuse(tmp_path, ValueError, message, rows)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.write(path, path.name)
    refuse(
        tmp_path,
        ValueError,
        rf"b\.zip', member 'a\.txt{suffix}', cannot be decompressed.*fetch it again",
        tmp_path / "b.zip",
    )


def test_errors_of_the_disk_are_not_taken_for_damage(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.bz2"
    path.write_bytes(bz2.compress(b"text"))

    def fail(self, *arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(bz2.BZ2File, "read", fail)
    refuse(tmp_path, OSError, "Errno 5", path)


def test_zstandard_with_a_long_window(tmp_path):
    """As `zstd --long=31` writes."""
    (tmp_path / "a.txt.zst").write_bytes(
        zstd(TEXT * 30, window_log=30, enable_ldm=True)
    )
    (tmp_path / "b.txt").write_text("b")
    assert (TEXT * 30).decode() in contents(build(config(tmp_path, tmp_path / "*.*")))


def test_without_zstandard(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"text"))
    monkeypatch.setitem(sys.modules, "compression", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    refuse(
        tmp_path,
        ImportError,
        r"a\.txt\.zst' needs the `zstandard` package.*pip install -e '.\[hf\]'",
        tmp_path / "a.txt.zst",
    )


def test_bad_archives(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK nonsense")
    refuse(tmp_path, ValueError, "not a whole zip archive", path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", "x")
    refuse(tmp_path, ValueError, r"None of the files of '.*a\.zip'", path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "some text that is stored as it is")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"stored", b"STORED"))
    refuse(tmp_path, ValueError, r"member 'a\.txt', cannot be decompressed", path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("é.txt", "its name is UTF-8")
    data = path.read_bytes()
    path.write_bytes(data.replace("é".encode(), b"\xe9\xe9"))
    refuse(tmp_path, ValueError, "not a whole zip archive", path)
    path.write_bytes(data.replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"))
    refuse(tmp_path, ValueError, "cannot be read: .*password", path)


# Rows ---------------------------------------------------------------------------------


JSON = [
    ('[{"text": "a"}, {"text": "b", "id": 3}]', ["a", "b"]),
    ('[\n  {\n    "text": "a"\n  },\n  {"text": "b"}\n]\n', ["a", "b"]),
    ('{"text": "a"}', ["a"]),
    ('{\n "id": 1,\n "text": "a\\nb"\n}', ["a\nb"]),
    ('{"text": "a"}\n\n{"text": "b"}\n', ["a", "b"]),
    ('\ufeff[{"text": "a"}]', ["a"]),
    ('\n\n{"text": "a"}\n{"text": "b"}', ["a", "b"]),
]


@pytest.mark.parametrize("data, rows", JSON)
def test_json_is_an_array_or_an_object_or_lines(tmp_path, data, rows):
    (tmp_path / "a.json").write_text(data)
    (tmp_path / "b.txt").write_text("other")
    cfg = config(tmp_path, tmp_path / "a.json", tmp_path / "b.txt")
    assert contents(build(cfg)) == sorted([*rows, "other"])


@pytest.mark.parametrize(
    "data, message",
    [
        (
            '[{"text": "a"}',
            r"a\.json' is not JSON \(Expecting.*an array of objects like",
        ),
        ('[{"text": "a"}, ["b"]]', "row 2 is list, but every row must be an object"),
        ("3", "row 1 is int"),
        ('{"text": "a"}\n{"text": "b"', r"line 2 is not JSON"),
        ('{"text": "a"}\n3', "line 2 is int"),
        ('[{"text": "a"}, {"text": 3}]', 'row 2: "text" is int, not a string'),
        ('{"text": {"a": 1}}', 'row 1: "text" is dict, not a string'),
        (
            '{"name": "x", "é": 1}',
            r'"text" in none of its rows; they have "name", "\\u00e9"',
        ),
        ("[{}, {}]", "they have nothing"),
        ("[" * 10**6, "is not JSON"),
        ('{"text": "\\ud800"}', 'row 1: character 0 of "text"'),
    ],
)
def test_json_of_something_else(tmp_path, texts, caplog, data, message):
    """An error where the file is named; left out with a warning where it is found."""
    path = texts[0] / "a.json"
    path.write_text(data)
    refuse(tmp_path, ValueError, message, path)
    corpus = build(config(tmp_path, texts[0]))
    assert contents(corpus) == sorted(texts[1].values())
    [record] = caplog.records
    assert record.message == "Skipped 1 file, not text: 'a.json'"
    assert [file["name"] for file in corpus.manifest["skipped"]] == ["a.json"]


def named(tmp_path, **files):
    """Files of rows: `a_jsonl` is a.jsonl."""
    paths = []
    for name, data in files.items():
        path = tmp_path / name.replace("_", ".")
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        paths.append(path)
    return paths


def test_the_key_of_the_text(tmp_path):
    paths = named(
        tmp_path,
        a_jsonl='{"body.md": "line", "text": 1}',
        b_json='[{"body.md": "row", "text": 2}]',
        c_parquet=parquet({"text": [3], "body": [4], "body.md": ["cell"]}),
    )
    corpus = build(config(tmp_path, *paths, text_key="body.md"))
    assert contents(corpus) == ["cell", "line", "row"]


def test_rows_without_text_are_skipped_and_counted(tmp_path, caplog):
    paths = named(
        tmp_path,
        a_jsonl='{"text": "a"}\n\n{"id": 3}\n{"text": null}\n{"text": ""}\n'
        '{"text": "b"}',
        b_json='[{"text": "c"}, {"id": 3}]',
        c_parquet=parquet({"text": [None, "d", "", "e", None]}),
        d_jsonl='{"text": null}\n{"text": ""}\n{}',
        e_jsonl='{"text": "f"}',
        f_parquet=parquet({"text": ["g"]}),
    )
    corpus = build(config(tmp_path, *paths))
    assert contents(corpus) == list("abcdefg")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        'Skipped 10 rows without text under "text", the first in '
        f"'{tmp_path}/a.jsonl' line 3"
    )
    files = {file["name"]: file for file in corpus.manifest["files"]}
    counts = {name: file.get("skipped_rows") for name, file in files.items()}
    assert counts == {
        "a.jsonl": 3,
        "b.json": 1,
        "c.parquet": 3,
        "e.jsonl": None,
        "f.parquet": None,
    }
    assert "skipped_rows" not in files["e.jsonl"]


@pytest.mark.parametrize(
    "name, data",
    [
        ("a_jsonl", '{"content": "a", "id": 1}\n{"id": 2, "content": "b", "url": "c"}'),
        ("a_json", '[{"content": "a", "id": 1}, {"url": "c"}]'),
        ("a_parquet", {"content": ["a"], "id": [1], "url": ["c"]}),
    ],
)
def test_a_file_whose_rows_lack_the_key(tmp_path, name, data):
    [path] = named(
        tmp_path, **{name: parquet(data) if isinstance(data, dict) else data}
    )
    message = (
        rf"{path.name}' has .text. in none of its rows; they have .content., .id., "
        r".url.\. Name the one that holds the text as text_key"
    )
    refuse(tmp_path, ValueError, message, path)
    if path.suffix != ".json":
        (tmp_path / "b.txt").write_text("found beside text")
        refuse(tmp_path, ValueError, message, tmp_path)
    corpus = build(config(tmp_path, path, text_key="content"))
    assert "a" in contents(corpus)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": 3}', 'line 2: "text" is int, not a string'),
        ('{"text": ["a"]}', 'line 2: "text" is list, not a string'),
        ('{"text": false}', 'line 2: "text" is bool, not a string'),
        ('["text"]', "line 2 is list, but every row must be an object"),
        ('{"text": "a', "line 2 is not JSON"),
        ('{"text": "ab\\ud800"}', "line 2: character 2"),
        ("[" * 10**6, "line 2 is not JSON"),
    ],
)
def test_bad_rows(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    refuse(tmp_path, ValueError, message, path)


def test_bad_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet({"text": [1, 2]}))
    refuse(tmp_path, ValueError, 'row 1: "text" is int, not a string', path)
    path.write_bytes(parquet({"body": []}))
    refuse(tmp_path, ValueError, 'they have "body"', path)
    path.write_bytes(parquet({"text": [["a"], ["b"]]}))
    refuse(tmp_path, ValueError, 'row 1: "text" is list, not a string', path)
    path.write_bytes(b"PAR1 nonsense")
    refuse(tmp_path, ValueError, "not a whole parquet file", path)
    plain = {"compression": "none", "use_dictionary": False}
    data = parquet({"text": ["good", "caf_ au lait"]}, **plain)
    path.write_bytes(data.replace(b"caf_", b"caf\xe9"))
    refuse(tmp_path, ValueError, 'row 2: "text" is not valid UTF-8', path)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip", "none"])
def test_parquet_that_is_damaged_in_the_middle(tmp_path, compression):
    rows = [f"{i} green bottles, {i * i % 97} left" for i in range(4000)]
    good = parquet({"text": rows}, compression=compression, row_group_size=1000)
    middle = len(good) // 2
    path = tmp_path / "rows.parquet"
    for bad in (
        good[:middle],
        good[:middle] + good[middle + 5000 :],
        good[:4] + b"\xff" * 3000 + good[3004:],
        good[:middle] + b"\0" * 3000 + good[middle + 3000 :],
        good[:4] + good[-8 - int.from_bytes(good[-8:-4], "little") :],
    ):
        path.write_bytes(bad)
        refuse(tmp_path, ValueError, r"rows\.parquet'.* is not ", path)
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(path, "rows.parquet")
        refuse(tmp_path, ValueError, r"member 'rows\.parquet'", tmp_path / "a.zip")


def test_without_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet({"text": ["a"]}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refuse(tmp_path, ImportError, r"needs the `pyarrow` package.*\.\[hf\]", path)
