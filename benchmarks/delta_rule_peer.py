"""The gated delta rule of the transformers package, run as a child process.

Reads one JSON request per line and answers each with one line. It runs in its own
environment with torch and transformers, and imports nothing of this project.
"""

import json
import sys
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from transformers.models.qwen3_next import modeling_qwen3_next  # pyright: ignore

NAMES = ("q", "k", "v", "beta", "g")


def run(inputs, d_o, gradients):
    """The seconds it took, and the results by name."""
    inputs = [x.clone().requires_grad_(gradients) for x in inputs]
    q, k, v, beta, g = inputs
    start = time.perf_counter()
    o, _ = modeling_qwen3_next.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta)
    if gradients:
        o.backward(d_o)
    seconds = time.perf_counter() - start
    results = {"o": o.detach()}
    if gradients:
        results |= {f"d_{n}": x.grad for n, x in zip(NAMES, inputs, strict=True)}
    return seconds, results


def main():
    answers, sys.stdout = sys.stdout, sys.stderr  # keep prints out of the answers
    for line in sys.stdin:
        request = json.loads(line)
        if "threads" in request:
            torch.set_num_threads(request["threads"])
            answer = {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        elif "load" in request:
            arrays = np.load(request["load"])
            inputs = [torch.from_numpy(arrays[n]) for n in NAMES]
            d_o = torch.from_numpy(arrays["d_o"])
            _, results = run(inputs, d_o, True)
            np.savez(request["save"], **{n: x.numpy() for n, x in results.items()})
            answer = {}
        else:
            answer = {"seconds": run(inputs, d_o, request["gradients"])[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
