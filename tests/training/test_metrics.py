"""Metric files that survive kills and resumes."""

import io
import json
import math
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.training.metrics import MetricWriter, read_metrics
from jaxlab.training.progress import Progress


def steps_of(path):
    return [line["step"] for line in read_metrics(path)]


def test_a_line_a_step_readable_at_once(tmp_path):
    with MetricWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": jnp.float32(2.5), "learning_rate": 1e-3})
        writer.write(2, {"loss": math.nan, "learning_rate": np.float64(2e-3)})
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert values[0] | {"time": 0} == {
        "step": 1,
        "time": 0,
        "loss": 2.5,
        "learning_rate": 1e-3,
    }
    assert values[1]["loss"] is None and values[1]["learning_rate"] == 2e-3


def test_a_resumed_run_holds_each_step_once(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.write(step, {"loss": 1.0})
    with MetricWriter(tmp_path) as writer:
        writer.truncate_after(4)
        for step in range(5, 10):
            writer.write(step, {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    assert steps_of(path) == list(range(1, 10))
    assert [line["loss"] for line in read_metrics(path)] == [1.0] * 4 + [2.0] * 5
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps_of(path) == [1, 2]
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": 2.0})
    assert steps_of(path) == [1, 2, 3]


DAMAGED = {
    "not JSON": b'{"step": 2, "loss"',
    "not an object": b"[2]",
    "no step": b'{"loss": 1.0}',
    "a step that is no number": b'{"step": "2", "loss": 1.0}',
    "a value that is no number": b'{"step": 2, "loss": "low"}',
    "not text": b"\xff\x00\xfe",
    "empty": b"",
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_costs_only_itself(line, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n%s\n{"step": 3}\n' % line)
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is not a JSON object"):
        read_metrics(path, strict=True)
    assert not caplog.text
    with MetricWriter(tmp_path) as writer:
        writer.truncate_after(3)
        assert caplog.text.count("1 damaged line(s) are left out") == 1
        assert not writer.has(2, "loss") and writer.has(3, "step")
    assert "the first is line 2" in caplog.text
    assert caplog.text.count("left out") == 1
    assert [line["step"] for line in read_metrics(path, strict=True)] == [1, 3]


def test_tensorboard_files_are_written_and_purged(tmp_path):
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401 installed
    from tensorboardX.proto.event_pb2 import Event

    def events():
        found = []
        for file in sorted(tmp_path.glob("events.out.tfevents.*")):
            data = file.read_bytes()
            while data:  # length, its checksum, the record, its checksum
                size = int.from_bytes(data[:8], "little")
                found.append(Event.FromString(data[12 : 12 + size]))
                data = data[16 + size :]
        return found

    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": 0.5})
    scalars = [(e.step, v.tag) for e in events() for v in e.summary.value]
    assert scalars == [(3, "loss")]
    with MetricWriter(tmp_path) as writer:
        writer.truncate_after(2)
    assert any(
        e.session_log.status == e.session_log.START and e.step == 3 for e in events()
    )


def test_without_tensorboardx_a_sentence_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.truncate_after(0)
        writer.write(1, {"loss": 2.0})
    assert "pip install -e '.[plot]'" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert [x["loss"] for x in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]


def test_only_process_0_writes_and_prints(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": 1.0})
        writer.truncate_after(0)
    assert not (tmp_path / "run").exists()
    stream = io.StringIO()
    progress = Progress(10, stream=stream)
    progress.update(10, 1.0, 1)
    progress.message("hello")
    progress.close()
    assert stream.getvalue() == ""


def test_a_full_disk_costs_lines_not_the_run(small_disk, caplog):
    threads = threading.active_count()
    with MetricWriter(small_disk / "run") as writer:
        writer.write(1, {"loss": 1.0})
        filler = small_disk / "filler"
        with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096) == 4096:
                pass
            raise OSError("full")
        for step in range(2, 200):
            writer.write(step, {"loss": 1.0})
        filler.unlink()
        writer.write(200, {"loss": 2.0})
    steps = [line["step"] for line in read_metrics(small_disk / "run/metrics.jsonl")]
    assert steps[0] == 1 and steps[-1] == 200 and len(steps) < 200
    assert "not recorded" in caplog.text and "No space left" in caplog.text
    assert threading.active_count() == threads


@pytest.mark.parametrize("how", ("deleted", "moved", "directory moved"))
def test_a_record_that_is_gone_begins_again(how, tmp_path, caplog):
    run = tmp_path / "run"
    path = run / "metrics.jsonl"
    with MetricWriter(run) as writer:
        writer.write(1, {"loss": 1.0})
        if how == "deleted":
            path.unlink()
        elif how == "moved":
            path.rename(tmp_path / "kept.jsonl")
        else:
            run.rename(tmp_path / "elsewhere")
        writer.write(2, {"loss": 2.0})
        if how != "directory moved":
            assert steps_of(path) == [2]
        else:
            assert "metrics of step 2 are not recorded" in caplog.text
            run.mkdir()
            writer.write(3, {"loss": 3.0})
            assert steps_of(path) == [3]
    assert "metrics.jsonl is gone; a new one begins" in caplog.text
