"""Experiments from papers: labelled runs over seeds, their scores, and a figure.

    python scripts/experiment.py state_tracking

An experiment is a module with three functions:

    cells(scale) -> {label: Cell}          the runs; scale is "cpu", or "gpu" for the
                                           paper's sizes; a cell is the configs of a
                                           curriculum, which mostly has one stage
    score(run: jaxlab.training.Run)        {name: number, list or dict of them} of a
                                           trained run, on data that was not used to
                                           choose or stop anything
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
"""The modules of this package that are experiments."""
