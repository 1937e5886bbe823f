"""Metric files that survive kills and resumes, the progress line, peaks, the plot."""

import builtins
import io
import itertools
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.training import metrics
from jaxlab.training.metrics import (
    MetricWriter,
    Progress,
    peak_flops,
    plot_losses,
    read_metrics,
)


def steps_of(path):
    return [line["step"] for line in read_metrics(path)]


# Files


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


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line():
    seconds = iter([0.0, 10.0])
    stream = io.StringIO()
    progress = Progress(
        600,
        flops_per_token=6e6,
        peak_flops=4e11,
        interval=0.0,
        stream=stream,
        clock=lambda: next(seconds),
    )
    progress.update(20, 3.0, 100_000)
    progress.update(120, 2.1341, 100_000 + 100 * 2048)
    first, second = stream.getvalue().splitlines()
    assert first == "step 20/600  loss 3.000"  # one time gives no speed
    # 100 steps in 10 s are 20480 tok/s, 1.2288e11 FLOP/s; 480 steps are left.
    assert second == "step 120/600  loss 2.134  20.5k tok/s  MFU 31%  0:48 left"


def test_without_a_peak_there_is_no_mfu_and_speed_is_recent():
    clock = itertools.chain([0.0, 100.0], itertools.count(101.0))
    stream = io.StringIO()
    progress = Progress(
        1000,
        flops_per_token=1.0,
        interval=0.0,
        window=3,
        stream=stream,
        clock=lambda: next(clock),
    )
    for step in range(6):  # the first step takes 100 s, the later ones 1 s
        progress.update(step, 1.0, step * 1_000_000)
    last = stream.getvalue().splitlines()[-1]
    assert last == "step 5/1000  loss 1.000  1.00M tok/s  16:35 left"


def test_tokens_are_those_of_the_steps_as_they_were():
    """Of 10, then 10, then 80 tokens in a second each."""
    clock, stream = itertools.count(0.0), io.StringIO()
    progress = Progress(9, interval=0.0, stream=stream, clock=lambda: next(clock))
    for step, tokens in enumerate((10, 20, 100), 1):
        progress.update(step, 1.0, tokens)
    assert [line.split("  ")[2] for line in stream.getvalue().splitlines()[1:]] == [
        "10 tok/s",
        "45 tok/s",
    ]


def test_elsewhere_than_on_a_terminal_a_line_an_interval():
    clock = itertools.count(0.0, 3.0)
    stream = io.StringIO()
    progress = Progress(20, interval=10.0, stream=stream, clock=lambda: next(clock))
    for step in range(1, 21):
        progress.update(step, 1.0, step)
    progress.message("held-out loss 1.2")
    progress.close()
    lines = stream.getvalue().splitlines()
    shown = [line.split()[1] for line in lines[:-1]]
    assert shown == ["1/20", "5/20", "9/20", "13/20", "17/20", "20/20"]
    assert lines[-1] == "held-out loss 1.2" and "\r" not in stream.getvalue()


def test_on_a_terminal_the_line_is_rewritten(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    clock = itertools.count(0.0)
    stream = Terminal()
    progress = Progress(9, stream=stream, clock=lambda: next(clock))
    progress.update(1, 1.0, 1)
    progress.update(2, 1.0, 2)
    progress.message("saved")
    progress.close()
    parts = stream.getvalue().split("\r")
    assert parts[1] == "step 1/9  loss 1.000\x1b[K"
    assert parts[2] == "step 2/9  loss 1.000  1 tok/s\x1b[K"  # cut to the width
    assert parts[3].startswith("saved\x1b[K\nstep 2/9")
    assert stream.getvalue().endswith("\n")


@pytest.mark.parametrize(
    "x, text",
    [
        (0.4, "0"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (9_994, "9.99k"),
        (9_996, "10.0k"),
        (99_960, "100k"),
        (1.25e6, "1.25M"),
        (3.2e12, "3200G"),
    ],
)
def test_three_digits(x, text):
    assert metrics._short(x) == text


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0:00"), (59.6, "1:00"), (102, "1:42"), (7390, "2:03:10")]
)
def test_durations(seconds, text):
    assert metrics._duration(seconds) == text


# Peaks


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_device_kind(kind, tera):
    device = types.SimpleNamespace(platform="other", device_kind=kind)
    assert peak_flops(device) == (None if tera is None else tera * 1e12)


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"])
def test_peaks_agree_with_those_in_jax(kind):
    from jax._src import tpu_info

    version = tpu_info.chip_version_from_device_kind(kind)
    info = tpu_info.get_tpu_info_for_chip(version, 1)
    chip = info.bf16_ops_per_second * version.num_physical_tensor_cores_per_chip
    device = types.SimpleNamespace(platform="tpu", device_kind=kind)
    assert peak_flops(device) == pytest.approx(chip, rel=0.01)  # theirs are rounded


def test_virtual_devices_share_the_cores_of_the_cpu(monkeypatch):
    devices = jax.devices()
    measured = peak_flops(devices[0]) * len(devices)
    assert 1e9 < measured < 1e14
    assert peak_flops(devices[-1]) * len(devices) == measured  # measured once
    monkeypatch.setattr(metrics, "_measured_cpu_flops", lambda: 8e9)
    assert peak_flops(devices[0]) == 8e9 / len(devices)


# The plot


def write_losses(path, held_out=True):
    with open(path, "w") as file:
        for step in range(1, 101):
            values = {"step": step, "loss": None if step == 7 else 2 + 2 / step}
            if held_out and step % 20 == 0:
                values["held_out_loss"] = 2.1 + 2 / step
            file.write(json.dumps(values) + "\n")


def test_plot_is_a_picture_with_every_label_apart(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    texts = []

    def boxes(figure, path):
        figure.canvas.draw()
        for text in figure.axes[0].texts:
            texts.append((text.get_text(), Text.get_window_extent(text)))  # no arrow
        width, height = figure.canvas.get_width_height()
        assert all(0 <= b.x0 and b.x1 <= width for _, b in texts)
        assert all(0 <= b.y0 and b.y1 <= height for _, b in texts)
        original(figure, path)

    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", boxes)
    write_losses(tmp_path / "metrics.jsonl")
    plot_losses(
        tmp_path / "metrics.jsonl",
        tmp_path / "loss.png",
        baselines={"unigram": 3.0, "bigram": 2.06, "uniform": 2.05},
        ylabel="bits per byte",
    )
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    names = [text.split()[0] for text, _ in texts]
    assert names == ["train", "held-out", "unigram", "bigram", "uniform"]
    for (_, a), (_, b) in itertools.combinations(texts, 2):
        assert not a.overlaps(b)


def test_plot_of_a_short_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n')
    plot_losses(path, tmp_path / "loss.png")
    path.write_text('{"step": 1, "loss": null}\n')
    with pytest.raises(ValueError, match="no value of 'loss'"):
        plot_losses(path, tmp_path / "loss.png")


def test_without_matplotlib_a_sentence_says_so(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install -e '.\[plot"):
        plot_losses(tmp_path / "x", tmp_path / "y.png")


def test_heights_are_the_nearest_that_are_apart():
    rng = np.random.default_rng(0)
    for _ in range(50):
        heights = list(rng.uniform(0.3, 0.7, 5))
        gap = 0.05
        found = metrics._apart(heights, gap, 0.0, 1.0)
        order = np.argsort(heights)
        assert (np.diff(found[order]) >= gap - 1e-12).all()
        # No small change that keeps the gaps comes nearer.
        cost = np.sum((found - heights) ** 2)
        for _ in range(200):
            other = found + rng.normal(size=5) * 0.01
            if (np.diff(other[order]) >= gap).all():
                assert np.sum((other - heights) ** 2) > cost - 1e-12
    assert metrics._apart([0.99, 1.0, 0.98], 0.1, 0.0, 1.0) == pytest.approx(
        [0.9, 1.0, 0.8]
    )
    np.testing.assert_allclose(metrics._apart([0.0, 0.01], 0.1, 0.0, 1.0), [0.0, 0.1])


def test_moving_average():
    x = np.arange(10.0) ** 2
    expected = [np.mean(x[max(0, i - 2) : i + 3]) for i in range(10)]
    np.testing.assert_allclose(metrics._moving_average(x, 2), expected)


def test_a_full_disk_costs_lines_not_the_run(small_disk, caplog):
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
