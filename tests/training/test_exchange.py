"""What devices exchange in a compiled training step is what `costs` says."""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from benchmarks.optimizers.costs import kfac_costs
from jaxlab import models, params
from jaxlab.mixers import attention
from jaxlab.models import LMConfig
from jaxlab.objectives import NextToken
from jaxlab.optimizers import (
    FRUGAL,
    LAMB,
    MKOR,
    SGD,
    SOAP,
    AdAdaGrad,
    AdamW,
    Muon,
    Shampoo,
    Switch,
    costs,
)
from jaxlab.params import MESH_AXES, MeshConfig
from jaxlab.training.state import abstract_state, create_state
from jaxlab.training.step import make_train_step

WIDTH, HIDDEN, LAYERS, VOCABULARY = 32, 96, 2, 264
UNTIED = LMConfig(
    vocab_size=VOCABULARY,
    width=WIDTH,
    n_layers=LAYERS,
    pattern=(attention.Config(WIDTH, n_heads=4),),
    mlp_hidden=HIDDEN,
    tie_embeddings=False,
)
TIED = LMConfig(
    vocab_size=VOCABULARY,
    width=WIDTH,
    n_layers=LAYERS,
    pattern=UNTIED.pattern,
    mlp_hidden=HIDDEN,
)
COPIES = MeshConfig(data=8)
MESHES = {
    "8 copies": COPIES,
    "4 copies of 2 shards": MeshConfig(data=4, fsdp=2),
    "4 copies, 2 of each layer": MeshConfig(data=4, tensor=2),
}
ALONG_DATA = (4, 8)  # devices that sum, in these meshes; 2 along the other axes
NUMBER = 4  # bytes
OPTIMIZERS = {
    "AdamW": AdamW(),
    "LAMB": LAMB(),
    "MKOR": MKOR(base=LAMB()),
    "MKOR-H, every 5": MKOR(base=LAMB(), period=5, switch=Switch()),
    "FRUGAL": FRUGAL(),
    "SOAP": SOAP(),
    "SGD": SGD(),
    "Shampoo": Shampoo(),
    "Muon": Muon(),
    "AdAdaGrad": AdAdaGrad(),
}
FIRST = list(OPTIMIZERS)[:6]  # the others only where there is time


# The programs -------------------------------------------------------------------------


class Collective(NamedTuple):
    """One exchange of a program.

    Attributes:
        op: such as "all-reduce".
        devices: that take part in it with one another; None where it names pairs.
        times: how often it runs.
        arrays: bytes of each array.
    """

    op: str
    devices: int | None
    times: int
    arrays: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.times * sum(self.arrays)


OPS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "s8": 1, "u8": 1, "pred": 1}
TURNS = r'known_trip_count":\{"n":"(\d+)"'
CALLED = r"(?:body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%[\w.-]+)"


def collectives(program: str) -> list[Collective]:
    """The exchanges of a compiled program, those in loops as often as these turn."""
    bodies, entry = {}, ""
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            bodies[head[2]] = body = []
            entry = head[2] if head[1] else entry
        elif bodies:
            body.append(line)

    def visit(name: str, times: int) -> Iterator[Collective]:
        for line in bodies[name]:
            found = re.match(r"\s+(?:ROOT )?%[\w.-]+ = (.*?) ([a-z-]+)\(", line)
            if found is None:
                continue
            result, op = found.groups()
            assert not op.endswith("-start"), f"{op} gives its operands, too"
            if op in OPS:
                yield Collective(op, devices(line), times, arrays(result))
            (turns,) = re.findall(TURNS, line) if op == "while" else (1,)
            for called in re.findall(CALLED, line):
                for inner in re.findall(r"%([\w.-]+)", called):
                    yield from visit(inner, times * int(turns))

    return list(visit(entry, 1))


def arrays(result: str) -> tuple[int, ...]:
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
    return tuple(
        SIZES[kind] * math.prod(int(n) for n in shape.split(",") if n)
        for kind, shape in found
    )


def devices(line: str) -> int | None:
    """In a group, however the groups are written."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", named[2]))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    return None


@functools.cache
def exchanges(mesh_cfg, optimizer, model=UNTIED, accumulate=1) -> list[Collective]:
    """The exchanges of a compiled training step."""
    mesh = params.make_mesh(mesh_cfg)
    with jax.set_mesh(mesh):
        transformation = built(optimizer, model)
        step = make_train_step(
            NextToken(model), transformation, accumulate, taps(optimizer)
        )
        state = abstract_state(models.spec(model), transformation, mesh)
        lowered = step.lower(state, batch(mesh), jax.random.key(0))
        return collectives(lowered.compile().as_text())


def batch(mesh):
    split = jax.NamedSharding(mesh, params.partition_spec(("batch",)))
    kinds = {
        "inputs": jnp.int32,
        "targets": jnp.int32,
        "weights": jnp.float32,
        "segment_ids": jnp.int32,
    }
    return {
        name: jax.ShapeDtypeStruct((16, 12), kind, sharding=split)
        for name, kind in kinds.items()
    }


def built(optimizer, model=UNTIED):
    return optimizer.build(models.spec(model), 1000)


def taps(optimizer, model=UNTIED):
    is_mkor = isinstance(optimizer, MKOR)
    return optimizer.tapped(models.spec(model)) if is_mkor else None


def report(mesh_cfg, optimizer, model=UNTIED, accumulate=1):
    specs, mesh = models.spec(model), params.make_mesh(mesh_cfg)
    tapped = taps(optimizer, model)
    return costs(built(optimizer, model), specs, mesh, accumulate, tapped)


def exchanged(found) -> int:
    return sum(each.bytes for each in found)


def test_the_reader_of_programs_counts_turns_and_tuples():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def shard(x):
        def turn(x, _):
            total = jax.lax.psum((x, jnp.sum(x)), "a")
            return x / (1 + total[0] + total[1]), None

        return jax.lax.psum(jax.lax.scan(turn, x, length=5)[0], ("a", "b"))

    split = PartitionSpec(("a", "b"))
    f = jax.shard_map(shard, mesh=mesh, in_specs=split, out_specs=PartitionSpec())
    found = collectives(jax.jit(f).lower(jnp.ones(24)).compile().as_text())
    assert {each.op for each in found} == {"all-reduce"}
    by_devices = {n: exchanged(e for e in found if e.devices == n) for n in (4, 8)}
    assert by_devices == {4: 5 * (3 + 1) * NUMBER, 8: 3 * NUMBER}
    assert exchanged(found) == sum(by_devices.values())


# Copies of the parameters: every byte -------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FIRST else pytest.mark.slow)
        for name in OPTIMIZERS
    ],
)
def test_copies_exchange_what_the_report_says_and_some_numbers(name):
    """The sums of the loss and of its weights."""
    found = exchanges(COPIES, OPTIMIZERS[name])
    assert {(each.op, each.devices) for each in found} == {("all-reduce", 8)}
    said = report(COPIES, OPTIMIZERS[name]).exchanged
    assert exchanged(found) == said + 2 * NUMBER


@pytest.mark.parametrize("accumulate", (1, 2))
def test_mkor_exchanges_the_statistics_more_than_its_base(accumulate):
    """In float32, a, g and the rows of q, k, v and o, of gate and up, and of down."""
    mkor, base = OPTIMIZERS["MKOR"], OPTIMIZERS["LAMB"]
    found, without = (
        exchanged(exchanges(COPIES, optimizer, accumulate=accumulate))
        for optimizer in (mkor, base)
    )
    attends, feeds = 4 * (2 * WIDTH + 1), 3 * (WIDTH + HIDDEN + 1)
    assert found - without == accumulate * LAYERS * (attends + feeds) * NUMBER
    said = report(COPIES, mkor, accumulate=accumulate)
    assert said.statistics == found - without
    assert said.gradients == report(COPIES, base, accumulate=accumulate).exchanged
    losses_and_weights = 2 * accumulate * NUMBER
    assert without == said.gradients + losses_and_weights


def test_a_table_that_is_also_the_head_is_exchanged_twice():
    more = exchanged(exchanges(COPIES, OPTIMIZERS["LAMB"], TIED))
    table = VOCABULARY * WIDTH * NUMBER
    said = report(COPIES, OPTIMIZERS["LAMB"], TIED).exchanged
    assert more == said + table + 2 * NUMBER


# Where devices split parameters -------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
def test_the_parts_of_gradients_are_summed_once(mesh):
    found = exchanges(MESHES[mesh], OPTIMIZERS["LAMB"])
    along = [each for each in found if each.devices in ALONG_DATA]
    assert {each.op for each in along} == {"all-reduce"}
    said = report(MESHES[mesh], OPTIMIZERS["LAMB"])
    assert exchanged(along) == said.gradients + 2 * NUMBER
    shards = 1 if mesh == "8 copies" else 2
    of_norms = (2 * LAYERS + 1) * WIDTH * NUMBER  # whole everywhere
    assert said.gradients == (said.parameters - of_norms) // shards + of_norms


@pytest.mark.parametrize("mesh", MESHES)
def test_statistics_are_summed_where_the_layers_are(mesh):
    """In the loop over the layers, which has gradients and taps, and no products of
    the optimizer's."""
    found, without = (
        exchanged(
            each
            for each in exchanges(MESHES[mesh], OPTIMIZERS[name])
            if each.times == LAYERS and each.devices in ALONG_DATA
        )
        for name in ("MKOR", "LAMB")
    )
    assert found - without == report(MESHES[mesh], OPTIMIZERS["MKOR"]).statistics > 0


@pytest.mark.parametrize("mesh", MESHES)
def test_factors_are_never_exchanged(mesh):
    """That of the hidden units is larger than any weight, even by halves."""
    weights = LAYERS * WIDTH * HIDDEN * NUMBER
    factor = LAYERS * HIDDEN * HIDDEN * NUMBER
    assert weights < factor / 2
    assert VOCABULARY * WIDTH * NUMBER < factor / 2
    for each in exchanges(MESHES[mesh], OPTIMIZERS["MKOR"]):
        assert max(each.arrays) < factor / 2


def test_shards_alone_have_no_copies_but_of_norms():
    said = report(MeshConfig(data=1, fsdp=8), OPTIMIZERS["MKOR"])
    assert said.gradients == (2 * LAYERS + 1) * WIDTH * NUMBER
    assert said.statistics == report(COPIES, OPTIMIZERS["MKOR"]).statistics
    alone = AbstractMesh((1, 1, 4, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    mkor = OPTIMIZERS["MKOR"]
    said = costs(built(mkor), models.spec(UNTIED), alone, tapped=taps(mkor))
    assert said.exchanged == 0  # one device has all tokens


# What is kept -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("AdamW", "MKOR", "FRUGAL", "SOAP"))
def test_a_device_has_the_state_that_the_report_says(name):
    mesh_cfg = MeshConfig(data=2, fsdp=2, tensor=2)
    mesh = params.make_mesh(mesh_cfg)
    with jax.set_mesh(mesh):
        state = create_state(models.spec(UNTIED), built(OPTIMIZERS[name]), mesh, seed=0)
    shards = [
        shard
        for leaf in jax.tree.leaves(state.opt_state)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    ]
    said = report(mesh_cfg, OPTIMIZERS[name])
    assert said.state_a_device == sum(shard.data.nbytes for shard in shards)
    assert said.state == sum(x.nbytes for x in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize("name", ("MKOR", "FRUGAL", "SOAP"))
def test_no_state_is_made_to_report_it(name):
    """Nor to know where one shall lie: it may fit on no single device."""
    transformation = built(OPTIMIZERS[name])

    def init(weights):
        state = transformation.init(weights)
        leaves = jax.tree.leaves(state)
        assert leaves and all(isinstance(leaf, Tracer) for leaf in leaves)
        return state

    traced = transformation._replace(init=init)
    abstract_state(
        models.spec(UNTIED), traced, params.make_mesh(MESHES["4 copies of 2 shards"])
    )


# Growth -------------------------------------------------------------------------------


def test_mkor_is_linear_in_the_width_and_kfac_quadratic():
    """From shapes alone, for a thousand copies."""
    widths = np.array([256, 512, 1024, 2048])
    mesh = AbstractMesh((1024, 1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    exchange, kept, by_kfac = [], [], []
    for width in map(int, widths):
        model = LMConfig(
            width=width,
            n_layers=12,
            pattern=(attention.Config(width),),
            mlp_hidden=4 * width,
        )
        specs, mkor = models.spec(model), OPTIMIZERS["MKOR"]
        base = costs(built(mkor.base, model), specs, mesh)
        tapped = taps(mkor, model)
        said = costs(built(mkor, model), specs, mesh, tapped=tapped)
        kfac = kfac_costs(base, specs, mesh, tapped)
        exchange.append(said.statistics)
        kept.append(said.state - base.state)
        by_kfac.append(kfac.statistics)
        assert kfac.statistics == kfac.state - base.state
        assert said.gradients == kfac.gradients == base.exchanged
    # a and g of q, k, v and o, and of gate, up and down; seven counts of rows
    assert exchange == [NUMBER * 12 * (4 * 2 * d + 3 * 5 * d + 7) for d in widths]
    squares = [12 * (4 * 2 + 3 * (1 + 16)) * d**2 for d in widths]
    assert kept == [2 * n + 2 * NUMBER for n in squares]  # bfloat16; two counters
    assert by_kfac == [2 * NUMBER * n for n in squares]
