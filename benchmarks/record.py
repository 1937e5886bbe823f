"""Write and read the results of a benchmark, with the hardware and versions."""

import importlib.metadata
import json
import os
import pathlib
import subprocess

import jax

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def record(name: str, **results) -> pathlib.Path:
    """Write `results/<name>.json`: the results, hardware, versions and commit.

    The load average includes the measured program itself; if it is far above the
    program's number of threads, the computer was shared.

    Args:
        results: JSON values; `versions` is added to the versions of jax and jaxlib.

    Returns:
        The path of the file.
    """
    devices = jax.devices()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    content = {
        "name": name,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "commit": commit(),
        "versions": versions | results.pop("versions", {}),
        **results,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def results(name: str) -> dict:
    """What a benchmark has recorded.

    Raises:
        ValueError: there is nothing, or it is not JSON.
    """
    path = RESULTS / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"There is no {path}; run its benchmark first.") from None
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); restore it, or run its benchmark again."
        ) from error


def commit() -> str:
    """The commit of the working tree, and whether its code has changed since."""

    def git(*arguments):
        return subprocess.run(
            ("git", *arguments), cwd=ROOT, capture_output=True, text=True
        )

    head = git("rev-parse", "HEAD")
    if head.returncode:
        return "none"
    changed = git("diff", "HEAD", "--name-only", "--", "*.py", "*.txt").stdout.strip()
    return head.stdout.strip() + (" with changes" if changed else "")
