"""Members of a population whose numbers need no drawing."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import params
from jaxlab.evolution import State


def normal(forms):
    """Normal numbers for a tree of shapes, about as large as parameters are."""
    rng = np.random.default_rng(0)

    def one(form):
        return (0.3 * rng.standard_normal(form.shape)).astype(form.dtype)

    return jax.tree.map(one, forms)


def members(strategy, specs):
    """Members in the form that `ask` gives them, of any numbers, and their axes."""
    forms = []

    def ask(weights):
        state = State(jax.random.key(1), jnp.int32(0))
        forms.append(strategy.ask(state, weights))
        return forms[0][0]

    return normal(jax.eval_shape(ask, params.abstract(specs))), forms[0][1]
