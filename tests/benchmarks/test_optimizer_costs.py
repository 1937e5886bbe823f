"""The recorded costs of optimizers are those of the code."""

import pytest

from benchmarks.optimizers.costs import MODELS, of_model
from benchmarks.tables.form import results
from jaxlab import models


@pytest.mark.parametrize("name", MODELS)
def test_the_recorded_costs_are_up_to_date(name):
    found = of_model(models.spec(MODELS[name]))
    assert results("optimizer_costs")["models"][name] == found


def test_what_the_methods_promise_of_memory_and_exchange():
    for found in results("optimizer_costs")["models"].values():
        adamw, mkor, kfac = (found[n] for n in ("AdamW", "MKOR, LAMB", "K-FAC, LAMB"))
        assert found["FRUGAL, density 0.25"]["state"] < 0.4 * adamw["state"]
        assert mkor["statistics"] < mkor["gradients"] / 100
        assert kfac["statistics"] > kfac["gradients"]
        # float32 and an inverse to each factor, against one factor in bfloat16
        factors = mkor["state"] - found["LAMB"]["state"]
        assert kfac["statistics"] == pytest.approx(4 * factors, rel=1e-5)
