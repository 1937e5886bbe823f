"""The runner: nothing done twice, nothing of another config reused, nothing lost."""

import dataclasses
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from benchmarks import record as recording
from benchmarks.experiments import EXPERIMENTS, figures, runner
from jaxlab.training import TrainConfig

CELLS = {"a": (TrainConfig(steps=7),), "b c": (TrainConfig(steps=8),)}


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Results go to a folder of the test."""
    monkeypatch.setattr(recording, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def finish(job, scores):
    job.path.write_text(
        json.dumps(
            {
                "label": job.label,
                "seed": job.seed,
                "seconds": 1.5,
                "parameters": 12,
                "state_floats": 3,
                "device": "cpu",
                "cpus": 1,
                "commit": "abc",
                "scores": scores,
            }
        )
    )


def test_seeds_come_in_turn_and_files_are_apart(tmp_path):
    jobs = runner.plan(CELLS, range(2), tmp_path)
    assert [(j.label, j.seed) for j in jobs] == [
        ("a", 0),
        ("b c", 0),
        ("a", 1),
        ("b c", 1),
    ]
    assert len({job.path for job in jobs}) == 4


def test_a_result_of_another_config_or_scoring_is_another_result(tmp_path):
    def path(cfg, scoring=1):
        return runner.plan({"a": (cfg,)}, [0], tmp_path, scoring)[0].path

    (cfg,) = CELLS["a"]
    assert path(cfg) != path(dataclasses.replace(cfg, steps=9))
    assert path(cfg) != path(cfg, 2)
    # Where a run goes changes nothing about it.
    assert path(cfg) == path(dataclasses.replace(cfg, directory="x", name="y", seed=5))


def test_results_of_more_runs_are_not_replaced(tmp_path):
    jobs = runner.plan(CELLS, range(2), tmp_path)
    for job in jobs:
        finish(job, {"z": 0.5})
    path = runner.assemble("fake", "cpu", CELLS, jobs)
    before = path.read_text()
    jobs[0].path.unlink()
    with pytest.raises(ValueError, match="4 runs, but only 3 are finished here"):
        runner.assemble("fake", "cpu", CELLS, jobs)
    assert path.read_text() == before


def test_a_fresh_clone_goes_on_from_the_results(tmp_path, results):
    jobs = runner.plan(CELLS, range(2), tmp_path)
    for job in jobs[:3]:
        finish(job, {"z": float(job.seed)})
    before = runner.assemble("fake", "cpu", CELLS, jobs).read_text()
    elsewhere = tmp_path / "clone"
    elsewhere.mkdir()
    jobs = runner.plan(CELLS, range(2), elsewhere)
    runner.unpack("fake", CELLS, jobs)
    assert [job.path.exists() for job in jobs] == [True, True, True, False]
    after = runner.assemble("fake", "cpu", CELLS, jobs).read_text()
    assert json.loads(after)["cells"] == json.loads(before)["cells"]
    other = runner.plan(CELLS, [0], elsewhere, 2)
    runner.unpack("fake", CELLS, other, 2)
    assert not any(job.path.exists() for job in other)
    longer = {label: (TrainConfig(steps=9),) for label in CELLS}
    other = runner.plan(longer, [0], elsewhere)
    runner.unpack("fake", longer, other)
    assert not any(job.path.exists() for job in other)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_committed_results_are_recognised(name, tmp_path, results):
    """Whatever was renamed, moved or added since: no run is done a second time."""
    results.mkdir()
    committed = recording.ROOT / "benchmarks" / "results" / f"{name}.json"
    shutil.copy(committed, results)
    module = f"benchmarks.experiments.{name}"
    _, cells, jobs = runner.prepare(module, 3, "cpu", tmp_path)
    assert [job.label for job in jobs if not job.path.exists()] == []
    assert len(jobs) == runner.recorded_runs(name) == runner.done(jobs)
    # They are enough to write the same results again.
    before = json.loads(committed.read_text())["cells"]
    after = json.loads(runner.assemble(name, "cpu", cells, jobs).read_text())["cells"]
    for label, cell in before.items():
        for what in ("summary", "commits", "devices", "cpus", "parameters"):
            assert after[label][what] == cell[what]


def test_the_list_counts_finished_runs(tmp_path, results, monkeypatch, capsys):
    results.mkdir()
    committed = recording.ROOT / "benchmarks" / "results" / "recall.json"
    shutil.copy(committed, results)
    monkeypatch.setattr(runner.prepare, "__defaults__", (tmp_path,))
    experiment()["main"]("recall", seeds=4, list=True)
    said = capsys.readouterr().out
    assert "\nMamba: 3 of 4 runs are finished\n36 of 48 runs are finished.\n" in said


def experiment():
    """The names of scripts/experiment.py."""
    return runpy.run_path(str(recording.ROOT / "scripts" / "experiment.py"))


def test_labels_of_one_file_name_are_refused(tmp_path):
    cells = {"a b": (TrainConfig(),), "a,b": (TrainConfig(),)}
    with pytest.raises(ValueError, match="same file name"):
        runner.plan(cells, [0], tmp_path)


def test_results_are_assembled_from_what_is_finished(tmp_path, capsys):
    jobs = runner.plan(CELLS, range(3), tmp_path)
    by_cell = {(job.label, job.seed): job for job in jobs}
    finish(by_cell["a", 0], {"z": 0.25, "by": [1.0, None]})
    finish(by_cell["a", 2], {"z": 0.75, "by": [2.0, 4.0]})
    path = runner.assemble("fake", "cpu", CELLS, jobs)
    assert "2 of 6 runs of fake are finished" in capsys.readouterr().out
    found = json.loads(path.read_text())["cells"]
    assert list(found) == ["a"]
    assert [run["seed"] for run in found["a"]["runs"]] == [0, 2]
    assert found["a"]["config"]["steps"] == 7
    summary = found["a"]["summary"]
    assert summary["z"] == {"mean": 0.5, "std": 0.25, "min": 0.25, "max": 0.75}
    assert [x and x["mean"] for x in summary["by"]] == [1.5, None]


def test_summaries_keep_the_order_of_the_scores():
    found = runner.summary([{"16": 1.0, "4": 0.0}, {"16": 0.0, "4": 0.0}])
    assert list(found) == ["16", "4"] and found["16"]["mean"] == 0.5


def test_more_jobs_than_cores_are_refused():
    with pytest.raises(ValueError, match="--jobs 1000"):
        runner.cores(1000, "cpu")
    assert runner.cores(3, "gpu") == [-1, -1, -1]


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_no_seeds_and_no_jobs_are_refused(scale):
    with pytest.raises(ValueError, match="--jobs 0 must be at least 1"):
        runner.cores(0, scale)
    with pytest.raises(ValueError, match="--seeds 0 must be at least 1"):
        runner.prepare("benchmarks.experiments.recall", 0, scale)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An experiment of two cells, and the arguments to run it."""
    (tmp_path / "fake_cells.py").write_text(
        "from jaxlab.training import TrainConfig\n"
        "def cells(scale):\n"
        "    return {'a': (TrainConfig(steps=7),), 'b': (TrainConfig(steps=8),)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield dict(seeds=1, jobs=1, finished=tmp_path / "finished")
    sys.modules.pop("fake_cells", None)


def test_what_would_not_be_written_is_not_trained(fake, tmp_path, monkeypatch):
    _, cells, jobs = runner.prepare("fake_cells", 1, "cpu", tmp_path)
    for job in jobs:
        finish(job, {"z": 0.5})
    path = runner.assemble("fake_cells", "cpu", cells, jobs)
    path.write_text(path.read_text().replace('"steps": 7', '"steps": 6'))
    before, started = path.read_text(), []
    monkeypatch.setattr(runner, "start", lambda *a: started.append(a))
    with pytest.raises(ValueError, match="json has 2 runs, but 1 would .* nothing is"):
        runner.run("fake_cells", only="b", **fake)
    assert started == [] and path.read_text() == before


@pytest.mark.parametrize("number", runner.STOPPING)
def test_a_signal_stops_the_workers_and_keeps_what_is_finished(
    number, fake, results, monkeypatch
):
    workers = []

    def start(module, scale, job, core):
        if job.label == "a":
            finish(job, {"z": 0.5})
            return subprocess.Popen(["true"])
        (job.path.parent / f"{job.path.stem}.half").mkdir()
        workers.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
        os.kill(os.getpid(), number)
        return workers[-1]

    monkeypatch.setattr(runner, "start", start)
    handler = signal.signal(number, lambda *_: pytest.fail("was not heard"))
    try:
        with pytest.raises(runner.Stopped) as stopped:
            runner.run("fake_cells", **fake)
    finally:
        signal.signal(number, handler)
    assert stopped.value.signal == number
    sentence = "1 of 2 runs are finished and kept; the same command continues."
    assert str(stopped.value) == f"Stopped; {sentence}"
    assert [worker.poll() for worker in workers] == [-signal.SIGKILL]
    left = {path.suffix for path in fake["finished"].glob("*/*")}
    assert left == {".json"} and not results.exists()


def test_the_command_says_that_it_was_stopped(monkeypatch, capsys):
    def run(*_, **__):
        raise runner.Stopped(signal.SIGTERM, "Stopped; 1 of 2")

    monkeypatch.setattr(runner, "run", run)
    with pytest.raises(SystemExit) as ended:
        experiment()["main"]("recall")
    assert ended.value.code == 143
    assert capsys.readouterr().err == "Stopped; 1 of 2\n"


FAKE = """
    from benchmarks.experiments import figures
    from jaxlab.data import GroupWordProblem
    from jaxlab.mixers import retnet
    from jaxlab.models import LMConfig
    from jaxlab.optimizers import AdamW, WarmupCosine
    from jaxlab.training import TaskData, TrainConfig

    def cells(scale):
        def stage(width, rate, length):
            return TrainConfig(
                data=TaskData(GroupWordProblem("parity", length), eval_rows=8),
                model=LMConfig(
                    vocab_size=8,
                    width=width,
                    n_layers=1,
                    pattern=(retnet.Config(width, n_heads=1),),
                ),
                optimizer=AdamW(rate, WarmupCosine(0)),
                batch_size=8,
                steps=2,
            )

        return {
            "narrow": (stage(8, 0.0, 3), stage(8, 1e-3, 5)),
            "fails": (stage(8, 1e30, 5),),
        }

    def score(run):
        return {"steps": float(run.step), "width": float(run.config.model.width)}

    def figure(results):
        drawing, axes = figures.panels(1)
        cells = results["cells"]
        widths = [cell["summary"]["width"] for cell in cells.values()]
        figures.bars(axes[0, 0], list(cells), widths, "k")
        return drawing
"""


@pytest.mark.slow
def test_runs_are_trained_scored_drawn_and_not_repeated(
    tmp_path, results, monkeypatch, capsys
):
    (tmp_path / "fake_experiment.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the workers
    arguments = dict(seeds=1, jobs=1, finished=tmp_path / "finished")
    with pytest.raises(RuntimeError, match="1 of 2 runs failed"):
        runner.run("fake_experiment", **arguments)
    said = capsys.readouterr().out
    assert "narrow, seed 0: " in said and "fails, seed 0: failed" in said
    found = json.loads((results / "fake_experiment.json").read_text())
    assert list(found["cells"]) == ["narrow"]
    assert found["cells"]["narrow"]["runs"][0]["scores"] == {"steps": 2, "width": 8}
    assert found["cells"]["narrow"]["state_floats"] > 0
    log = next(tmp_path.glob("finished/*/narrow*.log")).read_text()
    assert "Starting from the parameters" in log and "stage0 at step 2" in log
    assert (results / "fake_experiment.png").read_bytes()[:4] == b"\x89PNG"
    logs = [log.read_text() for log in tmp_path.glob("finished/*/fails*.log")]
    assert len(logs) == 1 and "not finite" in logs[0]

    started = []
    monkeypatch.setattr(runner, "start", lambda *a: started.append(a))
    runner.run("fake_experiment", only="narrow", **arguments)
    assert started == []  # it was finished
    with pytest.raises(ValueError, match="No cell of fake_experiment matches 'x'"):
        runner.run("fake_experiment", only="x", **arguments)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_cells_of_both_scales_are_configs_with_labels_of_their_own(name, tmp_path):
    module = __import__(f"benchmarks.experiments.{name}", fromlist=[name])
    for scale in ("cpu", "gpu"):
        cells = module.cells(scale)
        assert len(cells) >= 5
        jobs = runner.plan(cells, [0], tmp_path)
        assert len({job.path.name.split(".")[-3] for job in jobs}) == len(cells)
    for part in (
        "Paper",
        "Expected:",
        "Command: python scripts/experiment.py",
        "Minutes",
    ):
        assert part in module.__doc__


def test_drawing_needs_no_display(tmp_path):
    drawing, axes = figures.panels(2)
    one = {"mean": 1.0, "min": 0.5, "max": 2.0}
    figures.band(axes[0, 0], [1, 2, 4], [one, None, one], "a layer")
    figures.bars(axes[0, 1], ["a", "b"], [one, one], "k")
    drawing.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
    np.testing.assert_array_equal(axes[0, 0].lines[0].get_xdata(), [1, 4])
