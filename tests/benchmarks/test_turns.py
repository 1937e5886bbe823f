"""What is said of turns: powers, quartiles, and processes of other environments."""

import sys

import numpy as np
import pytest

from benchmarks.turns import Peer, alternate, power, quartiles


def test_power_of_made_up_times():
    sizes = np.array([256, 512, 1024, 2048])
    times = np.stack([3.0 * sizes**2.0, 0.1 * sizes**2.75], axis=1)
    assert np.allclose(power(sizes, times), [2.0, 2.75])
    assert np.isclose(power(sizes[2:], times[2:, 0] * [1, 2]), 3.0)


def test_a_time_of_nothing_has_no_power():
    with pytest.raises(ValueError, match="-0.5 is among the values"):
        power([1, 2], np.array([1.0, -0.5]))


def test_a_turn_that_is_not_counted_comes_first():
    calls = []

    def contestant(name):
        return lambda: calls.append(name) or len(calls)

    seconds = alternate({name: contestant(name) for name in "ab"}, turns=3)
    assert calls == list("abababab")
    assert seconds == {"a": [3, 5, 7], "b": [4, 6, 8]}
    assert quartiles(np.array(seconds["a"])) == {"median": 5, "quartiles": [4, 6]}


def test_a_peer_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be started .Permission"):
        Peer(str(tmp_path), tmp_path / "peer.py")


def test_a_peer_answers_until_it_ends(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text("print(input().replace('2', '4'), flush=True); input()")
    peer = Peer(sys.executable, script)
    with peer.process:
        assert peer.ask(steps=2) == {"steps": 4}
        with pytest.raises(RuntimeError, match=r"peer.py ended at .*'steps': 3"):
            peer.ask(steps=3)
