"""Checkpoints: exact, verified, and safe against kills, damage and full disks."""

import errno
import gc
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.training.checkpoint import CheckpointError, Checkpoints
from jaxlab.training.digest import digest

CONFIG = {"model": {"width": 8, "remat": False}, "learning_rate": 1e-3}
ROOT = Path(__file__).parents[2]

# When one array cannot be read, orbax drops the coroutines that read the others; Python
# says so when they are collected, which must happen before another file's tests.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True, scope="module")
def collected():
    yield
    gc.collect()


def mesh(*shape):
    names = ("data", "tensor")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def put(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def small_state(seed):
    """Two arrays and a PRNG key; the values tell the seed."""
    values = np.random.default_rng(seed).normal(size=(16, 8)).astype(np.float32)
    m = mesh(4, 2)
    return {
        "params": {"w": put(values, m, "data", "tensor")},
        "step": put(jnp.int32(seed), m),
        "key": put(jax.random.key(seed), m),
    }


def abstract(state, mesh=None):
    def leaf(x):
        sharding = NamedSharding(mesh, x.sharding.spec) if mesh else x.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, state)


def raw(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and raw(x) == raw(y)


def write(directory, steps, **options):
    with Checkpoints(directory, config=CONFIG, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, small_state(step), metrics={"loss": 1.0})


def entries(directory):
    return sorted(path.name for path in Path(directory).iterdir())


# The digest


def oracle_mix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


@pytest.mark.parametrize(
    "dtype, word",
    [
        (np.float32, np.uint32),
        (ml_dtypes.bfloat16, np.uint16),
        (ml_dtypes.float8_e4m3fn, np.uint8),
        (np.int32, np.uint32),
        (np.uint8, np.uint8),
        (bool, np.uint8),
        (np.complex64, np.uint32),
    ],
)
def test_digest_against_python_integers(dtype, word):
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(dtype)
    words = [int(w) for w in np.ascontiguousarray(x).view(word).ravel()]
    expected = sum(oracle_mix(w ^ oracle_mix(i)) for i, w in enumerate(words)) % 2**32
    assert int(digest(x)) == expected


@pytest.mark.parametrize("spec", [(), ("data",), ("tensor", "data"), (None, "tensor")])
def test_digest_does_not_depend_on_sharding(spec):
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    sharded = digest(put(x, mesh(4, 2), *spec))
    assert sharded.is_fully_replicated
    assert int(sharded) == int(digest(x))


def test_digest_sees_one_bit_and_every_swap():
    # Words that differ in high bits only are where weighted sums fail.
    x = np.array([1.0, 2.0, -1.0, 0.0, -0.0, np.nan, np.inf, 4.0], np.float32)
    seen = {int(digest(x))}
    for bit in range(32):
        for i in range(len(x)):
            y = x.copy()
            y.view(np.uint32)[i] ^= np.uint32(1 << bit)
            seen.add(int(digest(y)))
    assert len(seen) == 1 + 32 * len(x)
    swapped = set()
    for i in range(len(x)):
        for j in range(i):
            y = x.copy()
            y[[i, j]] = y[[j, i]]
            swapped.add(int(digest(y)))
    assert len(swapped) == len(x) * (len(x) - 1) // 2 and int(digest(x)) not in swapped


# Saving and restoring


def test_round_trip_onto_another_mesh(tmp_path):
    m = mesh(4, 2)
    bits = np.random.default_rng(1).integers(0, 2**16, (8, 4), np.uint16)
    state = (
        {
            "w": put(jnp.arange(64.0 * 32).reshape(64, 32), m, "data", "tensor"),
            "any bits": put(bits.view(ml_dtypes.bfloat16), m, "data"),
            "float8": put(jnp.ones((8,), jnp.float8_e4m3fn), m),
            "complex": put(jnp.full((4,), 1 - 2j, jnp.complex64), m),
        },
        [put(jnp.arange(-8, 8, dtype=jnp.int8), m, "data"), put(np.array([True]), m)],
        put(jax.random.split(jax.random.key(3), 8), m, "data"),
        put(jax.random.key(3, impl="rbg"), m),
        put(jnp.zeros((0, 4)), m),
        None,
    )
    other = mesh(2, 4)
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(7, state)
        step, restored = checkpoints.restore(abstract(state, other))
    assert step == 7
    assert_same(restored, state)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert x.sharding.is_equivalent_to(
            NamedSharding(other, y.sharding.spec), x.ndim
        )
    # The keys are keys of the same generator.
    assert jax.random.key_impl(restored[3]) == "rbg"


def test_state_may_be_donated_right_after_save(tmp_path):
    update = jax.jit(lambda x: x * 2.0 + 1.0, donate_argnums=0)
    x = put(np.random.default_rng(0).normal(size=(512, 512)), mesh(4, 2), "data")
    with Checkpoints(tmp_path, config=CONFIG, keep=9) as checkpoints:
        expected = {}
        for step in range(4):
            expected[step] = np.asarray(x).copy()
            checkpoints.save(step, {"x": x})
            for _ in range(3):
                x = update(x)
        for step, value in expected.items():
            _, state = checkpoints.restore(abstract({"x": x}), step=step)
            np.testing.assert_array_equal(state["x"], value)


def test_a_running_save_is_waited_for(tmp_path):
    x = put(np.zeros((1024, 1024), np.float32), mesh(4, 2), "data")
    with Checkpoints(tmp_path, config=CONFIG, keep=9) as checkpoints:
        for step in range(5):
            checkpoints.save(step, {"x": x})
    assert entries(tmp_path) == ["0", "1", "2", "3", "4"]


def test_keeps_the_newest_and_the_best_across_a_restart(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None, 6: 4.0}
    for some in [(1, 2, 3), (4, 5, 6)]:
        with Checkpoints(tmp_path, config=CONFIG, keep=2, keep_best=1) as checkpoints:
            for step in some:
                loss = losses[step]
                metrics = None if loss is None else {"loss": loss}
                checkpoints.save(step, {"x": jnp.ones(3)}, metrics=metrics)
    assert entries(tmp_path) == ["2", "5", "6"]


@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_data_continues_where_it_was(tmp_path, kind):
    def iterator():
        if kind == "dataset":
            dataset = grain.MapDataset.range(100).shuffle(seed=3).batch(2)
            return iter(dataset.to_iter_dataset())
        sampler = grain.samplers.IndexSampler(
            100,
            shuffle=True,
            seed=3,
            num_epochs=1,
            shard_options=grain.sharding.NoSharding(),
        )
        source = grain.sources.RangeDataSource(0, 100, 1)
        return iter(grain.DataLoader(data_source=source, sampler=sampler))

    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        first = iterator()
        for _ in range(5):
            next(first)
        checkpoints.save(1, {"x": jnp.ones(3)}, first)
        expected = [np.asarray(next(first)).tolist() for _ in range(4)]
        second = iterator()
        checkpoints.restore(abstract({"x": jnp.ones(3)}), second)
    assert [np.asarray(next(second)).tolist() for _ in range(4)] == expected


def test_restoring_data_that_was_not_saved_is_refused(tmp_path):
    write(tmp_path, [1])
    with pytest.raises(CheckpointError, match="saved without a data iterator"):
        Checkpoints(tmp_path, config=CONFIG).restore(
            abstract(small_state(1)), iter(grain.MapDataset.range(4).to_iter_dataset())
        )


def test_part_of_a_state(tmp_path):
    write(tmp_path, [5])
    state = small_state(5)
    _, params = Checkpoints(tmp_path, config=CONFIG).restore(
        abstract(state["params"]), subtree="params"
    )
    assert_same(params, state["params"])
    _, key = Checkpoints(tmp_path, config=CONFIG).restore(
        abstract(state["key"]), subtree="key"
    )
    assert_same(key, state["key"])


def test_reading_an_empty_place_makes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "misspelt", config=CONFIG)
    assert checkpoints.latest_step() is None
    with pytest.raises(CheckpointError, match="no checkpoint in .*misspelt"):
        checkpoints.restore({})
    with pytest.raises(CheckpointError, match="no checkpoint in .*misspelt"):
        checkpoints.load_config()
    checkpoints.close()
    assert entries(tmp_path) == []


def test_steps_only_increase(tmp_path):
    write(tmp_path, [3])
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        for step in (2, 3):
            with pytest.raises(CheckpointError, match="already holds step 3"):
                checkpoints.save(step, small_state(9))
        _, state = checkpoints.restore(abstract(small_state(3)))
        assert_same(state, small_state(3))
        # A last save that falls on a regular one.
        for _ in range(2):
            checkpoints.save(4, small_state(4))
    assert entries(tmp_path) == ["3", "4"]


def test_an_unfinished_save_is_ignored_and_then_removed(tmp_path):
    write(tmp_path, [3])
    unfinished = tmp_path / "7.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "3", unfinished)
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        assert checkpoints.latest_step() == 3
        assert checkpoints.restore(abstract(small_state(3)))[0] == 3
        assert unfinished.exists()  # it may be a running save of another program
        checkpoints.save(4, small_state(4))
    assert entries(tmp_path) == ["3", "4"]


def test_config_comes_back(tmp_path):
    write(tmp_path, [1])
    assert Checkpoints(tmp_path, config={}).load_config() == CONFIG
    with pytest.raises(CheckpointError, match="step 9: .*missing"):
        Checkpoints(tmp_path, config={}).load_config(9)


# Damage


def damage(path, how):
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 0x10])
        path.write_bytes(content[:middle] + flipped + content[middle + 1 :])


@pytest.mark.parametrize("how", ["removed", "truncated", "empty", "one bit"])
def test_any_damaged_file_gives_right_values_or_the_step_before(tmp_path, how):
    original = tmp_path / "original"
    write(original, [1, 2])
    files = [p for p in (original / "2").rglob("*") if p.is_file()]
    assert len(files) > 8
    fell_back = 0
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(original, copy)
        damage(copy / file.relative_to(original), how)
        step, state = Checkpoints(copy, config=CONFIG).restore(abstract(small_state(0)))
        assert_same(state, small_state(step))
        if step == 1:
            fell_back += 1
        shutil.rmtree(copy)
    assert fell_back >= 3  # at least the metadata, the arrays' manifest and values


def test_fallback_says_what_and_frees_the_step(tmp_path, caplog):
    write(tmp_path, [1, 2, 3])
    damage(tmp_path / "3" / "meta" / "metadata", "one bit")
    (tmp_path / "2" / "state").rename(tmp_path / "2" / "other")
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        step, state = checkpoints.restore(abstract(small_state(0)))
        assert step == 1
        assert_same(state, small_state(1))
        assert entries(tmp_path) == ["1", "corrupt-2", "corrupt-3"]
        said = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
        assert "Step 3" in said[0] and "its metadata file is damaged" in said[0]
        assert "moved to corrupt-3, and step 1 is used instead" in said[0]
        assert "Step 2" in said[1] and "its arrays cannot be read" in said[1]
        checkpoints.save(2, small_state(2))
        checkpoints.save(3, small_state(3))
        assert checkpoints.restore(abstract(small_state(0)))[0] == 3


def test_arrays_of_another_step_do_not_have_the_digest(tmp_path, caplog):
    """Files that are whole and readable, but hold other values."""
    write(tmp_path, [1, 2])
    shutil.rmtree(tmp_path / "2" / "state")
    shutil.copytree(tmp_path / "1" / "state", tmp_path / "2" / "state")
    step, _ = Checkpoints(tmp_path, config=CONFIG).restore(abstract(small_state(0)))
    assert step == 1
    assert "does not have the digest it was saved with" in caplog.text


def test_a_second_damage_of_the_same_step_gets_another_name(tmp_path):
    for _ in range(2):
        shutil.rmtree(tmp_path / "1", ignore_errors=True)
        write(tmp_path, [1, 2])
        damage(tmp_path / "2" / "meta" / "metadata", "empty")
        Checkpoints(tmp_path, config=CONFIG).restore(abstract(small_state(0)))
    assert entries(tmp_path) == ["1", "corrupt-2", "corrupt-2-2"]


def test_when_none_is_usable_each_step_and_reason_is_listed(tmp_path):
    write(tmp_path, [1, 2])
    damage(tmp_path / "1" / "meta" / "metadata", "removed")
    damage(tmp_path / "2" / "meta" / "metadata", "truncated")
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path, config=CONFIG).restore(abstract(small_state(0)))
    assert "step 1: its metadata file is missing" in str(error.value)
    assert "step 2: its metadata file is damaged" in str(error.value)
    assert entries(tmp_path) == ["1", "2"]


def test_a_step_asked_for_by_number_is_used_or_refused(tmp_path):
    write(tmp_path, [1, 2, 3])
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
    step, state = checkpoints.restore(abstract(small_state(0)), step=2)
    assert step == 2
    assert_same(state, small_state(2))
    with pytest.raises(CheckpointError, match=r"no complete .* step 9 .*\[1, 2, 3\]"):
        checkpoints.restore(abstract(small_state(0)), step=9)
    damage(tmp_path / "3" / "meta" / "metadata", "empty")
    with pytest.raises(CheckpointError, match="step 3: its metadata file is damaged"):
        checkpoints.restore(abstract(small_state(0)), step=3)
    assert entries(tmp_path) == ["1", "2", "3"]


# Another model


def test_another_model_is_refused_and_nothing_is_moved(tmp_path):
    write(tmp_path, [1, 2])
    config = {"model": {"width": 4, "remat": False}, "learning_rate": 1e-3}
    state = small_state(0)
    state["params"] = {"w": put(jnp.zeros((16, 4)), mesh(4, 2)), "b": jnp.zeros(4)}
    del state["step"]
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path, config=config).restore(abstract(state))
    message = str(error.value)
    assert "belongs to another model" in message
    assert "model.width: 8 in the checkpoint, 4 now" in message
    assert (
        "params.w: 'float32[16, 8]' in the checkpoint, 'float32[16, 4]' now" in message
    )
    assert "params.b: absent in the checkpoint" in message
    assert "step: 'int32[]' in the checkpoint, absent now" in message
    assert "learning_rate" not in message
    assert entries(tmp_path) == ["1", "2"]


def test_model_fields_must_agree_even_if_the_shapes_do(tmp_path):
    write(tmp_path, [1])
    state = abstract(small_state(0))
    other = {"model": {"width": 8, "remat": True}, "learning_rate": 1e-4}
    with pytest.raises(CheckpointError, match="model.remat: False in the checkpoint"):
        Checkpoints(tmp_path, config=other).restore(state)
    allowed = Checkpoints(tmp_path, config=other, may_differ=["model.remat"])
    assert allowed.restore(state)[0] == 1


def test_many_differences_are_counted(tmp_path):
    state = {f"x{i:02}": jnp.zeros(2) for i in range(20)}
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(1, state)
        wider = {name: jnp.zeros(3) for name in state}
        with pytest.raises(CheckpointError, match="code that builds .* and 12 more"):
            checkpoints.restore(abstract(wider))


# Full disks


def test_a_full_disk_is_reported_and_survived(small_disk):
    directory = small_disk / "run"
    # Random bits, which zstd cannot compress.
    noise = np.random.default_rng(0).integers(0, 2**32, (700, 1000), np.uint32)
    small, large = {"x": jnp.asarray(noise[:100])}, {"x": jnp.asarray(noise)}
    with Checkpoints(directory, config=CONFIG) as checkpoints:
        checkpoints.save(1, small)
        checkpoints.wait()
        with pytest.raises(CheckpointError) as error:
            checkpoints.save(2, large)
            checkpoints.wait()
        message = str(error.value)
        assert "Step 2 could not be saved in" in message and str(directory) in message
        assert "the disk is full" in message
        assert "The last complete checkpoint is step 1" in message
        assert entries(directory) == ["1"]
        checkpoints.save(2, {"x": small["x"] + jnp.uint32(1)})
        _, state = checkpoints.restore(abstract(small))
        np.testing.assert_array_equal(state["x"], noise[:100] + np.uint32(1))


@pytest.mark.parametrize("part", ["blocking", "background"])
def test_an_error_of_the_disk_in_either_part_of_a_save(tmp_path, monkeypatch, part):
    def full(*args, **kwargs):
        raise ValueError("while writing") from OSError(errno.ENOSPC, "No space left")

    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(1, small_state(1))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            if part == "blocking":
                patch.setattr(ocp.CheckpointManager, "save", full)
            else:  # the metadata is written by a thread
                patch.setattr(type(checkpoints.directory), "write_text", full)
            with pytest.raises(
                CheckpointError, match="Step 2 .* disk is full.* step 1"
            ):
                checkpoints.save(2, small_state(2))
                checkpoints.wait()
        assert entries(tmp_path) == ["1"]
        checkpoints.save(3, small_state(3))
        assert checkpoints.restore(abstract(small_state(0)))[0] == 3


def test_a_failure_in_the_background_does_not_cost_the_next_save(
    tmp_path, monkeypatch, caplog
):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left")

    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(1, small_state(1))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(type(checkpoints.directory), "write_text", full)
            checkpoints.save(2, small_state(2))
            time.sleep(0.5)
        checkpoints.save(3, small_state(3))
        assert "Step 2 could not be saved" in caplog.text
    assert entries(tmp_path) == ["1", "3"]


def test_a_place_that_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "run", config=CONFIG)
    with pytest.raises(CheckpointError, match="Step 1 could not be saved.*no complete"):
        checkpoints.save(1, small_state(1))


# Kills

PREAMBLE = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxlab.training.checkpoint import Checkpoints, CheckpointError
CONFIG = {"model": {"width": 8, "remat": False}, "learning_rate": 1e-3}
def state_of(step, mesh, spec):
    full = np.random.default_rng(step).normal(size=(256, 128)).astype(np.float32)
    def make(x, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
    return {"w": make(full, *spec), "step": make(np.int32(step))}
def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
def check(step, state):
    want = np.random.default_rng(step).normal(size=(256, 128)).astype(np.float32)
    for shard in state["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, want[shard.index])
    assert int(state["step"].addressable_data(0)) == step
"""

SAVES_FOREVER = """
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
with Checkpoints(sys.argv[1], config=CONFIG) as checkpoints:
    step = checkpoints.latest_step()
    if step is None:
        step = 0
    else:
        step, state = checkpoints.restore(abstract(state_of(0, mesh, ("data",))))
        check(step, state)
    print("ready", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, state_of(step, mesh, ("data",)), metrics={"loss": 1.0})
        print("saving", step, flush=True)
"""


def start(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path):
    moments = random.Random(0)
    unfinished = 0
    for _ in range(8):
        child = start(SAVES_FOREVER, tmp_path)
        saves = moments.randint(2, 5)
        output = []
        for line in child.stdout:  # each run first restores what the last one left
            output.append(line)
            saves -= line.startswith("saving")
            if saves == 0:
                break
        else:
            pytest.fail(f"the child ended with {child.wait()}: {''.join(output)}")
        time.sleep(0.03 * moments.random())
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        unfinished += any(tmp_path.glob("*.orbax-checkpoint-tmp*"))
    w = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    step, state = Checkpoints(tmp_path, config=CONFIG).restore(
        {"w": w, "step": jax.ShapeDtypeStruct((), jnp.int32)}
    )
    expected = np.random.default_rng(step).normal(size=(256, 128)).astype(np.float32)
    np.testing.assert_array_equal(state["w"], expected)
    assert step > 6 and unfinished > 0
    assert not list(tmp_path.glob("corrupt-*"))
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(step + 1, state)
    assert not list(tmp_path.glob("*.orbax-checkpoint-tmp*"))


# Several processes

TWO_PROCESSES = """
directory, port, process, part = sys.argv[1:]
jax.distributed.initialize(
    f"localhost:{port}", 2, int(process), heartbeat_timeout_seconds=10)
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
spec = ("data", "tensor")
class Counter:
    def get_state(self): return {"next": 10 * jax.process_index() + 5}
    def set_state(self, state): assert state == self.get_state(), state
with Checkpoints(directory, config=CONFIG) as checkpoints:
    if part == "save":
        for step in (1, 2):
            checkpoints.save(step, state_of(step, mesh, spec), Counter())
    else:
        goal = abstract(state_of(0, mesh, spec))
        step, state = checkpoints.restore(goal, Counter())
        check(step, state)
        print("restored", step, flush=True)
        checkpoints.save(2, state_of(2, mesh, spec), Counter())
        checkpoints.wait()
        assert checkpoints.restore(goal, Counter())[0] == 2
print("done", flush=True)
jax.distributed.shutdown()
"""


def run_two(directory, part):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    children = [start(TWO_PROCESSES, directory, port, i, part) for i in range(2)]
    outputs = []
    try:
        outputs = [child.communicate(timeout=60)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0 and "done" in output, output
    return outputs


@pytest.mark.slow
def test_two_processes_save_and_one_restores(tmp_path):
    run_two(tmp_path, "save")
    target = NamedSharding(mesh(2, 4), P("tensor", "data"))
    goal = {
        "w": jax.ShapeDtypeStruct((256, 128), jnp.float32, sharding=target),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
    step, state = checkpoints.restore(goal)
    expected = np.random.default_rng(2).normal(size=(256, 128)).astype(np.float32)
    assert step == 2 and state["w"].sharding == target
    np.testing.assert_array_equal(state["w"], expected)
    with pytest.raises(
        CheckpointError, match="positions of 2 processes .* this run has 1"
    ):
        checkpoints.restore(goal, iter(grain.MapDataset.range(4).to_iter_dataset()))


@pytest.mark.slow
def test_damage_that_one_process_sees_makes_both_fall_back(tmp_path):
    run_two(tmp_path, "save")
    # The chunks that process 1 wrote; process 0 has no need of them.
    chunks = max(
        (p for p in (tmp_path / "2" / "state").rglob("ocdbt.process_1/d/*")),
        key=lambda p: p.stat().st_size,
        default=None,
    )
    assert chunks is not None
    damage(chunks, "truncated")
    outputs = run_two(tmp_path, "restore")
    assert all("restored 1" in output for output in outputs), outputs
    assert "process 1 could not read its part" in outputs[0]
    assert (tmp_path / "corrupt-2").is_dir()
