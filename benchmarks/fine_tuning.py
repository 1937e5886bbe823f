"""Fine-tune the model of `make train` by EGGROLL and by GRPO, with as many answers.

    python -m benchmarks.fine_tuning [--seeds 3] [--steps 150]

Both use configs/sums_*.py: 2048 answers a step, with only right or wrong as feedback. A
score is the share of greedy answers that are right, to questions from training and to
held-out ones. Finished runs are not repeated, so the same command continues. Writes
`results/fine_tuning.json` and `.png`.
"""

import dataclasses
import pathlib
import shutil
import time

import jax
import tyro

from benchmarks.record import RESULTS, ROOT, record
from jaxlab import config
from jaxlab.rl import ask, exact_match_reward
from jaxlab.training import load_run, train
from jaxlab.training.metrics import read_metrics
from jaxlab.training.problems import FineTuning, SearchConfig

METHODS = {"EGGROLL": "sums_eggroll", "GRPO": "sums_grpo"}
KEY = jax.random.key(0)
RUNS = ROOT / "runs" / "fine_tuning"


def main(seeds: int = 3, steps: int = 150) -> None:
    """Run, record and draw.

    Args:
        seeds: number of runs of each method.
        steps: number of steps in each run.
    """
    methods = {}
    for method, name in METHODS.items():
        cfg = config.load(ROOT / "configs" / f"{name}.py")
        runs = [
            run(
                dataclasses.replace(
                    cfg,
                    name=f"{name}_{seed}",
                    directory=str(RUNS),
                    seed=seed,
                    steps=steps,
                    eval_every=5,
                )
            )
            for seed in range(seeds)
        ]
        methods[method] = {"config": config.to_json(cfg), "runs": runs}
    task = cfg.task
    assert isinstance(task, FineTuning)
    base = load_run(task.init_from)
    asked = ask(task.questions, 1, range(task.eval_questions))
    right = float(exact_match_reward(base.params, asked, KEY, base.config.model))
    path = record(
        "fine_tuning",
        base=task.init_from,
        base_step=base.step,
        base_right=round(right, 4),
        answers_a_step=task.answers_a_step,
        methods=methods,
    )
    draw(methods, task.answers_a_step, path.with_suffix(".png"))
    print(f"Wrote {path}.")


def run(cfg: SearchConfig) -> dict:
    """Run a config, unless it has run before, and return its curves and its seconds."""
    folder = pathlib.Path(cfg.directory) / cfg.name
    done = folder / "seconds"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        train(cfg)
        done.write_text(str(round(time.monotonic() - started, 1)))
    lines = read_metrics(folder / "metrics.jsonl", strict=True)
    names = ("right", "right_held_out")
    return {
        "seed": cfg.seed,
        "seconds": float(done.read_text()),
        **{
            name: [[x["step"], round(x[f"score/{name}"], 4)] for x in scored]
            for name in names
            for scored in [[x for x in lines if f"score/{name}" in x]]
        },
    }


def draw(methods: dict, answers_a_step: int, path: pathlib.Path) -> None:
    """Plot the share of right answers over answers seen; thin lines are held-out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    colors = ("#1f5fa8", "#d9601a")
    for (method, result), color in zip(methods.items(), colors, strict=True):
        for number, run in enumerate(result["runs"]):
            label = method if number == 0 else None
            axes.plot(*curve(run["right"], answers_a_step), color=color, label=label)
            held_out = curve(run["right_held_out"], answers_a_step)
            axes.plot(*held_out, color=color, linewidth=0.7, alpha=0.6)
    axes.set(
        xlabel="answers seen",
        ylabel="share of greedy answers that are right",
        title="Sums of one digit, by the model of make train (thin: held out)",
        ylim=(0, 1.02),
        xlim=(0, None),
    )
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.savefig(path)


def curve(points: list, answers_a_step: int) -> tuple[list, list]:
    return [step * answers_a_step for step, _ in points], [y for _, y in points]


if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    tyro.cli(main)
