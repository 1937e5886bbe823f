"""Write a benchmark's results, with what they were measured on."""

import importlib.metadata
import json
import os
import pathlib
import subprocess

import jax

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def record(name: str, **results) -> pathlib.Path:
    """Write `results/<name>.json`: the results and where they come from.

    The load average counts the measured program itself; far above the number of its
    threads it says that the machine was shared.

    Args:
        results: anything JSON holds; `versions` adds to those of jax and jaxlib.

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


def commit() -> str:
    """The commit of the working tree, marked where its code differs from it."""

    def git(*arguments):
        return subprocess.run(
            ("git", *arguments), cwd=ROOT, capture_output=True, text=True
        )

    head = git("rev-parse", "HEAD")
    if head.returncode:
        return "none"
    changed = git("diff", "HEAD", "--name-only", "--", "*.py", "*.txt").stdout.strip()
    return head.stdout.strip() + (" with changes" if changed else "")
