"""The options of scripts/train.py that are no fields of a config."""

import importlib.util
import pathlib

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    found = importlib.util.spec_from_file_location("train", ROOT / "scripts/train.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-processes 2", "describe the processes of --distributed; add it"),
        ("--distributed --process-id 0", "are given together"),
        (
            "--distributed --coordinator-address here --num-processes 2 --process-id 0",
            "--coordinator-address here must be HOST:PORT",
        ),
        (
            "--distributed --coordinator-address h:1 --num-processes 2 --process-id 2",
            "--process-id 2 must be from 0 to --num-processes 2 less 1",
        ),
        ("--distributed", "found no cluster"),
    ],
)
def test_processes_are_described_completely(script, options, message, monkeypatch):
    def no_cluster(*place):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    config = str(ROOT / "configs/cartpole.py")
    with pytest.raises(ValueError, match=message):
        script.run([config, *options.split()])
