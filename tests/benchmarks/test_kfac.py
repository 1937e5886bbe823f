"""What K-FAC elsewhere is given: the weights and batches of the harness."""

import numpy as np

from benchmarks.optimizers import compare, kfac, problems


class Idle:
    """A peer that never moves."""

    def ask(self, **request):
        if "open" in request:
            self.opened = dict(np.load(request["settings"]["path"]))
        elif "weights" in request:
            kept = {k: v for k, v in self.opened.items() if k[:2] in ("w_", "b_")}
            np.savez(request["path"], **kept)
        return {"mean_loss": 2.0}


def test_the_peer_has_the_weights_and_batches_of_the_harness(tmp_path):
    problem, peer = problems.digits(batch_size=8), Idle()
    base = compare.Runs(problem, compare.METHODS["Adam"], 20)
    found = kfac.one_run(problem, base, peer, tmp_path / "run.npz", 3)
    (weights, _), keys = base.start(3)
    given = peer.opened
    for step, key in enumerate(keys.reshape(-1)):
        x, y = problem.batch(key)
        np.testing.assert_array_equal(given["x"][given["rows"][step]], x)
        np.testing.assert_array_equal(given["y"][given["rows"][step]], y)
    for i in range(len(weights)):
        np.testing.assert_array_equal(given[f"w_{i}"], weights[f"layer_{i}"]["w"])
    assert found["losses"] == [2.0, 2.0]
    figures = {k: compare.rounded(x) for k, x in problem.figures(weights).items()}
    assert figures.items() <= found.items()
    assert found["followed"] == [compare.rounded(problem.follow(weights))] * 2
