"""Retention: which steps are kept."""

import math

import orbax.checkpoint as ocp


class NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keep the newest `keep` steps and the `keep_best` steps of lowest loss.

    orbax's own BestN reads a separate metrics file when the manager is made and
    fails there if it is damaged; the losses here come from the metadata.
    """

    def __init__(self, keep: int, keep_best: int):
        self.keep = keep
        self.keep_best = keep_best
        self.losses: dict[int, float] = {}

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        rated = [s for s in steps if math.isfinite(self.losses.get(s, math.inf))]
        best = sorted(rated, key=lambda s: self.losses[s])[: self.keep_best]
        return [s in best or s in steps[-self.keep :] for s in steps]
