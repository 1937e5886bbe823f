"""Specs derived from arrays, and the rules that overrule them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxlab import params
from jaxlab.params import ParamSpec, infer

TREE = {
    "embedding": jnp.ones((7, 4)),
    "blocks": {"w": jnp.ones((3, 4, 5), jnp.bfloat16), "b": np.ones((3, 5))},
    "scale": jax.ShapeDtypeStruct((4,), jnp.float32),
    "temperature": jnp.ones(()),
}


def summary(specs):
    return {
        name: (spec.shape, spec.axes, spec.role)
        for name, spec in params.named_leaves(specs)
    }


def test_axes_decide_the_role():
    specs = infer(TREE)
    assert summary(specs) == {
        "embedding": ((7, 4), (None, None), "matrix"),
        "blocks/w": ((3, 4, 5), ("layers", None, None), "matrix"),
        "blocks/b": ((3, 5), (None, None), "matrix"),
        "scale": ((4,), (None,), "scale"),
        "temperature": ((), (), "scale"),
    }
    assert specs["blocks"]["w"].dtype == jnp.bfloat16
    assert params.count(specs) == 28 + 60 + 15 + 4 + 1


def test_rules_overrule_it_and_the_first_one_wins():
    rules = [("(embedding)", "embedding"), (".*/b", "bias"), ("matrix", "head")]
    specs = infer(TREE, rules)
    assert summary(specs) == {
        "embedding": ((7, 4), (None, None), "embedding"),
        "blocks/w": ((3, 4, 5), ("layers", None, None), "head"),
        "blocks/b": ((3, 5), ("layers", None), "bias"),
        "scale": ((4,), (None,), "scale"),
        "temperature": ((), (), "scale"),
    }


def test_a_filter_has_no_stack():
    filters = {"kernel": jnp.ones((3, 3, 8, 4))}
    assert infer(filters)["kernel"].axes == ("layers", "layers", None, None)
    spec = infer(filters, [("kernel", "convolution")])["kernel"]
    assert (spec.role, spec.axes) == ("convolution", (None,) * 4)


def test_specs_stay_as_they_are():
    specs = {
        "w": ParamSpec((3, 4), ("width", "hidden")),
        "b": ParamSpec((4,), (None,), role="bias"),
    }
    same = infer(specs)
    assert all(same[name] is spec for name, spec in specs.items())
    ruled = infer(specs, [("w", "embedding")])
    assert ruled["w"] == dataclasses.replace(specs["w"], role="embedding")
    assert ruled["b"] is specs["b"]


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.LayerNorm()(linen.Dense(4)(x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: Any
    bias: Any


@pytest.mark.parametrize("kind", ("linen", "nnx", "dataclass", "list and tuple"))
def test_trees_of_others_keep_their_structure(kind):
    w, b = jnp.ones((3, 4)), jnp.ones((4,))
    x = jax.ShapeDtypeStruct((1, 3), jnp.float32)
    tree = {
        "linen": lambda: jax.eval_shape(Linen().init, jax.random.key(0), x),
        "nnx": lambda: nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param),
        "dataclass": lambda: Layer(w, b),
        "list and tuple": lambda: [(w, b), None, 1.0],
    }[kind]()
    specs = infer(tree)
    assert jax.tree.structure(specs) == jax.tree.structure(tree)
    for spec, leaf in zip(jax.tree.leaves(specs), jax.tree.leaves(tree), strict=True):
        assert spec.shape == jnp.shape(leaf)
        assert spec.role == ("matrix" if len(spec.shape) == 2 else "scale")


def test_masked_leaves_have_no_spec():
    specs = infer({"w": optax.MaskedNode(), "b": jnp.ones(3)})
    assert specs["w"] == optax.MaskedNode() and specs["b"].role == "scale"


@pytest.mark.parametrize(
    ("rule", "message"),
    (
        (
            ("blocks/v", "bias"),
            "The rule 'blocks/v' matches no parameter. It is neither",
        ),
        (("scale", "filter"), "the role 'filter', which is not one of"),
        (("decay", "bias"), r"'decay' is a role, and .* write '\(decay\)'"),
        (
            ("scale", "matrix"),
            r"'scale' with shape \(4,\) cannot have the role 'm",
        ),
        (("temp.*", "head"), r"'temperature' with shape \(\) cannot have the role"),
    ),
)
def test_rules_that_cannot_be(rule, message):
    with pytest.raises(ValueError, match=message):
        infer(TREE, [rule])


@pytest.mark.parametrize(
    ("leaf", "message"),
    (
        (jax.nn.relu, "The leaf 'f' is a .*, not an array"),
        ("relu", "The leaf 'f' is a str, not an array"),
        (jnp.ones((0, 3)), r"The leaf 'f' with shape \(0, 3\) has no entries"),
    ),
)
def test_leaves_that_cannot_be(leaf, message):
    with pytest.raises(ValueError, match=message):
        infer({"f": leaf})
