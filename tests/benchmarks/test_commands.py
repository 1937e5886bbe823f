"""The benchmarks' commands: a wrong call ends with a sentence and does nothing."""

import json
import os
import pathlib
import runpy
import signal
import sys

import pytest

from benchmarks import block_sizes
from benchmarks import record as recording
from benchmarks.command_line import sentences
from benchmarks.optimizers import compare
from pallas_kernels.tpu import block_sizes as chosen

SCRIPTS = pathlib.Path(__file__).parent.parent.parent / "scripts"


def said(monkeypatch, script, *arguments):
    """What a command ends with."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    return ended.value.code  # a text goes to stderr, with status 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--turns", "0"], "--turns 0 must be at least 1."),
        (["--device", "--turns", "-3"], "--turns -3 must be at least 1."),
        (["--peer-python", "/nowhere"], "/nowhere cannot be started (No such file"),
        (["--shapes", "huge"], "--shapes huge: choose from small, long, wide,"),
        (["--device", "--shapes", "training"], "choose from long, few, wide, small."),
        (["--cycles", "--turns", "3"], "--turns has no use with --cycles; leave it"),
        (["--device", "--peer-python", "x"], "--peer-python has no use with --device"),
    ],
)
def test_wrong_calls_of_bench_kernels(monkeypatch, arguments, sentence):
    code = said(monkeypatch, "bench_kernels.py", *arguments)
    assert code.startswith("error: ") and sentence in code


def test_tuning_what_is_not_there_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(chosen, "PATH", tmp_path / "chosen.json")
    monkeypatch.setattr(block_sizes, "record", lambda *_, **__: pytest.fail("wrote"))
    code = said(monkeypatch, "tune_kernels.py", "--only", "nope")
    assert code.startswith("error: --only 'nope' matches none of delta_rule, linear")
    assert not chosen.PATH.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nope"], "There is no problem 'nope'; choose from autoencoder, digits,"),
        (["digits", "--steps", "15"], "--steps 15 must be a multiple of 10 above 0."),
        (["digits", "--steps", "0"], "--steps 0 must be a multiple of 10 above 0."),
        (["digits", "--seeds", "0"], "--seeds 0 must be at least 1."),
        (["digits", "--workers", "0"], "--workers 0 must be from 1 to"),
        (["digits", "--workers", "999"], "the number of available cores"),
        (["digits", "--methods", "Foo"], "--methods Foo: choose from SGD; Adam;"),
        (["digits", "--methods", "SGD", "SGD"], "--methods names one of them twice"),
        (["digits", "--methods", "SGD"], "has runs of 200 steps by 2 seeds; use those"),
    ],
)
def test_wrong_calls_of_compare_optimizers(monkeypatch, tmp_path, arguments, sentence):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    recorded = {"steps": 200, "methods": {"Adam": {"runs": [{}, {}]}}}
    (tmp_path / "optimizers_digits.json").write_text(json.dumps(recorded))
    code = said(monkeypatch, "compare_optimizers.py", *arguments)
    assert code.startswith("error: ") and sentence in code


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"There is no .*mom.json; run its benchmark first\."),
        ("{\n", r"mom.json is not JSON \(.*line 2.*; restore it, or run its"),
        ("{}", r"The table mom of page.md cannot be made, .* lack 'cases'; run its"),
    ],
)
def test_a_table_needs_its_results(tmp_path, monkeypatch, content, sentence):
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    if content is not None:
        (tmp_path / "mom.json").write_text(content)
    page = tmp_path / "page.md"
    page.write_text("<!-- mom -->\n<!-- /mom -->\n")
    script = runpy.run_path(str(SCRIPTS / "result_tables.py"))
    monkeypatch.setitem(script["filled"].__globals__, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=sentence):
        script["filled"](page)


def test_help_of_result_tables_is_no_error(monkeypatch, capsys):
    assert said(monkeypatch, "result_tables.py", "--help") == 0
    assert "With\n--check nothing is written" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_its_status(number, capsys):
    before, cleaned = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as ended, sentences():
        try:
            os.kill(os.getpid(), number)
        finally:
            cleaned.append(True)
    assert ended.value.code == 128 + number and cleaned
    assert capsys.readouterr().err == "Stopped.\n"
    assert signal.getsignal(signal.SIGTERM) == before
