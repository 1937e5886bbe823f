"""Specs: initialisation, stacking, selection, shardings, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers
from jax.sharding import AxisType, PartitionSpec

from jaxlab import params
from jaxlab.params import MeshConfig, ParamSpec

SPECS = {
    "embedding": ParamSpec((32, 8), ("vocab", "width"), role="embedding"),
    "block": {
        "w": ParamSpec((8, 16), ("width", "hidden")),
        "scale": ParamSpec((8,), (None,), initializers.ones, "scale"),
    },
}


def test_shapes_of_spec_and_init_agree(key):
    arrays = params.init(SPECS, key)
    expected = params.abstract(SPECS)
    assert jax.tree.structure(arrays) == jax.tree.structure(expected)
    for array, shape in zip(
        jax.tree.leaves(arrays), jax.tree.leaves(expected), strict=True
    ):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
    assert params.count(SPECS) == params.count(arrays) == 32 * 8 + 8 * 16 + 8


def test_adding_a_parameter_leaves_the_others_alone(key):
    more = {"another": SPECS["block"]["w"], **SPECS}
    np.testing.assert_array_equal(
        params.init(SPECS, key)["block"]["w"], params.init(more, key)["block"]["w"]
    )


def test_stacked_layers_differ_and_keep_their_variance(key):
    spec = params.stack({"w": ParamSpec((256, 64), ("width", "hidden"))}, 3)
    assert spec["w"].axes == ("layers", "width", "hidden")
    w = params.init(spec, key)["w"]
    assert w.shape == (3, 256, 64)
    np.testing.assert_allclose(jnp.std(w, axis=(1, 2)), 1 / 16, rtol=0.05)
    assert not np.allclose(w[0], w[1])


def test_select_by_role_and_path():
    chosen = params.select(
        SPECS, [("scale", "none"), ("block/.*", "adam"), (".*", "sgd")]
    )
    assert chosen == {"embedding": "sgd", "block": {"w": "adam", "scale": "none"}}


def test_select_names_what_it_does_not_cover():
    with pytest.raises(ValueError, match=r"2 of 3 .*block/w \(role.*embedding"):
        params.select(SPECS, [("scale", 1)])


def test_select_names_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match="'blocks/w' matches no parameter"):
        params.select(SPECS, [("blocks/w", 1), (".*", 2)])


def test_shardings_follow_the_table(key):
    mesh = params.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tree = params.shardings(SPECS, mesh)
    assert tree["block"]["w"].spec == PartitionSpec("fsdp", "tensor")
    assert tree["embedding"].spec == PartitionSpec("tensor", "fsdp")
    init = jax.jit(lambda k: params.init(SPECS, k), out_shardings=tree)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        init(key),
        params.init(SPECS, key),
    )


def test_constrain_acts_under_a_mesh_only():
    x = jnp.ones((8, 4))
    assert params.constrain(x, "batch", None) is x
    mesh = params.make_mesh(MeshConfig(data=4, tensor=2))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: params.constrain(2 * x, "batch", None))(x)
    split = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    assert y.sharding.is_equivalent_to(split, 2)


def test_a_users_own_mesh_is_left_alone():
    with jax.set_mesh(jax.make_mesh((8,), ("dp",), axis_types=(AxisType.Auto,))):
        y = jax.jit(lambda x: params.constrain(x, "batch", None))(jnp.ones((8, 4)))
    assert y.shape == (8, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParamSpec((2, 3), ("width",)), "2 dimensions but axes"),
        (lambda: ParamSpec((0,), (None,)), "below 1"),
        (lambda: ParamSpec((2,), (None,), role="weight"), "'weight' is not one of"),
        (lambda: ParamSpec((3,), (None,)), r"shape \(3,\) .* role 'matrix', but"),
        (
            lambda: ParamSpec((2, 3), ("layers", None)),
            r"\('layers', None\) has the role 'matrix', but a matrix is \[\*stack, in,",
        ),
        (lambda: params.partition_spec(("wide",)), r"\['wide'\] are not in the rules"),
        (lambda: params.partition_spec(("heads", "vocab")), "cannot split two"),
        (lambda: params.make_mesh(MeshConfig(data=3)), "do not multiply to the 8"),
        (lambda: params.make_mesh(MeshConfig(data=-1, fsdp=-1)), "-1 at most once"),
        (
            lambda: params.shardings(
                {"head": ParamSpec((8, 257), ("width", "vocab"))},
                params.make_mesh(MeshConfig(tensor=2)),
            ),
            "head: its 'vocab' dimension of 257 cannot be split over 2 devices",
        ),
    ],
)
def test_errors_name_the_value_and_the_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()
