"""Kills at any moment, and two processes that share a directory."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from saved_states import CONFIG, damage, mesh

from jaxlab.checkpoint import CheckpointError, Checkpoints

# When one array cannot be read, orbax drops the coroutines that read the others; Python
# says so when they are collected, which must happen before another file's tests.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


ROOT = Path(__file__).parents[2]

PREAMBLE = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxlab.checkpoint import Checkpoints, CheckpointError
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
    # Two processes must not write one cache, and a kill must not leave half an entry.
    alone = {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment = os.environ | alone
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
