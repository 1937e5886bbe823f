"""Signals while compiled code runs, which Python's own handlers wait for."""

import signal
import subprocess
import sys
import time

import pytest

CHILD = """
import jax, jax.numpy as jnp
from jaxlab.training.stopping import stop_signals

def work(x):
    return jax.lax.fori_loop(0, 40, lambda _, y: y @ x, x)

run = jax.jit(work).lower(jnp.eye(1200)).compile()
with stop_signals() as received:
    print("begun", flush=True)
    while not received:
        jax.block_until_ready(run(jnp.eye(1200)))
    print("received", *received, flush=True)
    jax.block_until_ready(run(jnp.eye(1200)))
print("ended", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_is_told_at_once_and_a_second_one_stops(name, count):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "begun\n"
    for _ in range(count):
        time.sleep(0.2)
        child.send_signal(getattr(signal, name))
    told = child.stdout.readline()
    assert told.startswith(f"{name}: the step under way is finished and saved")
    said, errors = child.communicate(timeout=120)
    if count == 1:
        assert child.returncode == 0 and said == f"received {name}\nended\n"
    else:
        assert "ended" not in said and child.returncode != 0
        assert "KeyboardInterrupt" in errors or child.returncode == -signal.SIGTERM
