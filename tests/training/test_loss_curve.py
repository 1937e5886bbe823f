"""The loss curve, and how its labels are kept apart."""

import builtins
import itertools
import json

import numpy as np
import pytest

from jaxlab.training.loss_curve import _apart, _moving_average, plot_losses


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


def test_no_plot_of_a_damaged_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is not .* remove the"):
        plot_losses(path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


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
        found = _apart(heights, gap, 0.0, 1.0)
        order = np.argsort(heights)
        assert (np.diff(found[order]) >= gap - 1e-12).all()
        # No small change that keeps the gaps comes nearer.
        cost = np.sum((found - heights) ** 2)
        for _ in range(200):
            other = found + rng.normal(size=5) * 0.01
            if (np.diff(other[order]) >= gap).all():
                assert np.sum((other - heights) ** 2) > cost - 1e-12
    assert _apart([0.99, 1.0, 0.98], 0.1, 0.0, 1.0) == pytest.approx([0.9, 1.0, 0.8])
    np.testing.assert_allclose(_apart([0.0, 0.01], 0.1, 0.0, 1.0), [0.0, 0.1])


def test_moving_average():
    x = np.arange(10.0) ** 2
    expected = [np.mean(x[max(0, i - 2) : i + 3]) for i in range(10)]
    np.testing.assert_allclose(_moving_average(x, 2), expected)
