"""Experiments of the papers: labelled runs over seeds, their scores, and a figure.

    python scripts/experiment.py state_tracking

An experiment is a module with three functions:

    cells(scale) -> {label: Cell}          the runs; scale is "cpu" or "gpu", the latter
                                           with the paper's own sizes; a cell is the
                                           configs of a curriculum, mostly of one stage
    score(run: jaxlab.training.Run)        {name: number, list or dict of them} of a
                                           trained run, on data that nothing was chosen
                                           or stopped by
    figure(results)                        a matplotlib Figure of the assembled results
"""

EXPERIMENTS = (
    "state_tracking",
    "recall",
    "needle",
    "lact",
    "selective_copying",
    "induction",
)
"""Modules of this package."""
