"""Check that compiled programs on a CPU compute the right values.

    python -m benchmarks.compiled [--eager] [--only "delta*"] [--shapes 512,8 64,64]

XLA for CPUs delegates some fusions of matrix products to a library. In jaxlib 0.11.2 to
0.12.0.1 the product is wrong if its right operand repeats one number and a reduction is
fused with it (`tests/kernels/test_compiler.py` has the smallest program). This
benchmark compiles every operation and mixer with these fusions and without, and
compares all results: without a state, with an empty state created in the same program,
for a step, and of the gradient. Where the two differ, float64 decides which one is
wrong. It also searches the compiled program for products that such a fusion would get
wrong, because uninitialised memory often happens to be zero, which is right. Writes
benchmarks/results/compiled_jax_<version>.json; takes about an hour on one core. The
committed ones end within 16 rows of 256 tokens; compiled_more_jax_<version>.json has
the rest, by ``--shapes 16,256 1024,4 --name compiled_more_jax_<version>``.
`compiled_before.json` has the results for one head at commit 299883b, before empty
states were hidden from the compiler (without Mixture-of-Memories of over 64 rows).
"""

import fnmatch
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import pallas_kernels
from benchmarks.record import record
from jaxlab import params
from jaxlab.layers.norm import rms_norm
from jaxlab.mixers import (
    aaren,
    attention,
    delta_product,
    gla,
    lact,
    mamba,
    mamba2,
    mixer_of,
    mom,
    retnet,
)

HEADS = (1, 2, 4)
SHAPES = ((1024, 4), (512, 8), (200, 16), (128, 32), (64, 64), (16, 256))
SIZE = 32  # size of a head's keys and values
WIDTH = 64
PARTS = ("forward", "with state", "step", "gradient")
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}
"""Differences that are certainly rounding, as shares of an array's largest number.

The norm of an output near zero and sums that cancel amplify rounding. There the program
must not be much further from float64 than the one without the fusions, or than the
function outside of `jax.jit`."""
MORE_ERROR = 4.0
NO_FUSIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    # The reference need not be fast, and compiles in half the time.
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

Program = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments


def operations(heads: int, rows: int, tokens: int, dtype: Any) -> dict[str, Program]:
    """Every operation with its arguments."""
    keys = iter(jax.random.split(jax.random.key(heads), 16))

    def normal(*shape):
        return jax.random.normal(next(keys), shape).astype(dtype)

    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    B, T, H, D = rows, tokens, heads, SIZE
    q, k, v = normal(B, T, H, D), unit(normal(B, T, H, D)), normal(B, T, H, D)
    k_steps, v_steps = unit(normal(B, T, 2, H, D)), normal(B, T, 2, H, D)
    beta = jax.nn.sigmoid(normal(B, T, H))
    beta_steps = jax.nn.sigmoid(normal(B, T, 2, H))
    g = -jax.nn.softplus(normal(B, T, H).astype(jnp.float32))
    g_channel = -jax.nn.softplus(normal(B, T, H, D).astype(jnp.float32))
    E, N = 2 * D * H, 8
    scan = (
        normal(B, T, E),
        jax.nn.softplus(normal(B, T, E)),
        -jnp.exp(normal(E, N).astype(jnp.float32)),
        normal(B, T, N),
        normal(B, T, N),
    )
    linear_attention = pallas_kernels.gated_linear_attention
    return {
        "delta_rule": (pallas_kernels.delta_rule, (q, k, v, beta)),
        "delta_rule, decay": (pallas_kernels.delta_rule, (q, k, v, beta, g)),
        "delta_product": (
            pallas_kernels.delta_product,
            (q, k_steps, v_steps, beta_steps, g),
        ),
        "delta_rule, values of one": (pallas_kernels.delta_rule, (q, k, None, beta)),
        "linear_attention": (linear_attention, (q, k, v)),
        "linear_attention, values of one": (linear_attention, (q, k, None, g)),
        "linear_attention, decay a head": (linear_attention, (q, k, v, g)),
        "linear_attention, decay a channel": (linear_attention, (q, k, v, g_channel)),
        "selective_scan": (pallas_kernels.selective_scan, scan),
    }


def mixer_configs(heads: int) -> dict[str, Any]:
    """Every mixer with so many heads; Mamba, which has no heads, only with one."""
    head_size = WIDTH // heads
    configs = {
        "attention": attention.Config(WIDTH, n_heads=heads),
        "attention, window": attention.Config(WIDTH, n_heads=heads, window=4),
        "delta_product": delta_product.Config(WIDTH, n_heads=heads),
        "delta_net": delta_product.Config(
            WIDTH, n_heads=heads, n_householders=1, forget_gate=False, beta_max=1.0
        ),
        "gla": gla.Config(WIDTH, n_heads=heads),
        "retnet": retnet.Config(WIDTH, n_heads=heads),
        "mamba2": mamba2.Config(WIDTH, head_size=2 * head_size, n_states=16),
        "mom": mom.Config(WIDTH, n_heads=heads),
        "mom, linear attention": mom.Config(
            WIDTH, n_heads=heads, rule="linear_attention"
        ),
        "lact": lact.Config(WIDTH, n_heads=heads, n_fast_heads=heads, chunk_size=16),
        "aaren": aaren.Config(WIDTH, n_heads=heads),
    }
    if heads == 1:
        configs["mamba"] = mamba.Config(WIDTH)
    return configs


def programs_of_operation(call: Callable, arguments) -> dict[str, Program]:
    """The programs to compile for an operation; values of None stand for ones."""
    if arguments[2] is None:
        q, k, _, *rest = arguments
        return programs_of_operation(_with_ones(call), (q, k, *rest))

    def normalised(o):
        return rms_norm(o, jnp.ones(o.shape[-1:]))

    def forward(*arrays):
        return normalised(call(*arrays)[0])

    def with_state(*arrays):
        _, shape = jax.eval_shape(call, *arrays)
        empty = jnp.zeros(shape.shape, shape.dtype)
        o, state = call(*arrays, initial_state=empty)
        return normalised(o), normalised(state)

    return _with_gradient(forward, with_state, arguments)


def _with_ones(call: Callable) -> Callable:
    """The operation as a function of (q, k, ...), with values of one made inside."""

    def of_ones(q, k, *rest, **settings):
        return call(q, k, jnp.ones_like(q), *rest, **settings)

    return of_ones


def programs_of_mixer(cfg: Any, rows: int, tokens: int, dtype: Any):
    """The programs to compile for a mixer."""
    mixer = mixer_of(cfg)
    init = partial(params.init, mixer.spec(cfg))
    weights = jax.jit(init, compiler_options=NO_FUSIONS)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (rows, tokens, WIDTH)).astype(dtype)

    def forward(weights, x):
        return mixer.forward(weights, x, cfg)[0]

    def with_state(weights, x):
        state = mixer.init_state(cfg, rows, tokens, dtype)
        return mixer.forward(weights, x, cfg, state=state)

    def step(weights, x):
        state = mixer.init_state(cfg, rows, tokens, dtype)
        return mixer.step(weights, x, cfg, state)

    programs = _with_gradient(forward, with_state, (weights, x))
    return programs | {"step": (step, (weights, x[:, 0]))}


def _with_gradient(forward, with_state, arguments) -> dict[str, Program]:
    def loss(*arguments):
        return jnp.sum(jnp.sin(forward(*arguments).astype(jnp.float32)))

    gradient = jax.grad(loss, argnums=tuple(range(len(arguments))))
    return {
        "forward": (forward, arguments),
        "with state": (with_state, arguments),
        "gradient": (gradient, arguments),
    }


def difference(results: Any, others: Any) -> float:
    """Return the largest difference of two trees, in units of each array's size."""

    def relative(a, b):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        error = np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-6)
        return float(error) if np.isfinite(error) else float("inf")

    pairs = zip(jax.tree.leaves(results), jax.tree.leaves(others), strict=True)
    return max((relative(a, b) for a, b in pairs), default=0.0)


def constant_operands(program: str) -> list[str]:
    """Find products in the library's fusions whose right operand repeats along an axis.

    Not all of them are wrong, but all known wrong products are among them.

    Args:
        program: the text of an optimised HLO module for a CPU.

    Returns:
        The names of the JAX operations that the products come from.
    """
    computations: dict[str, dict[str, tuple[str, str, list[str]]]] = {}
    fused: set[str] = set()
    current: dict[str, tuple[str, str, list[str]]] = {}
    for line in program.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = computations.setdefault(opened[1], {})
        elif made := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\S+) ([\w\-]+)\(", line):
            operands = line[made.end() :].partition(")")[0]
            current[made[1]] = made[3], line, re.findall(r"%([\w.\-]+)", operands)
            if "__ynn_fusion" in line and (
                called := re.search(r"calls=%?(\S+),", line)
            ):
                fused.add(called[1])
    return [
        place[1] if (place := re.search(r'op_name="([^"]*)"', line)) else line
        for name in sorted(fused)
        for operation, line, operands in computations[name].values()
        if operation == "dot" and _repeats(computations[name], operands[1])
    ]


def _repeats(computation, name: str) -> bool:
    """Whether a value is broadcast along its last axis."""
    operation, line, operands = computation.get(name, ("parameter", "", []))
    if operation in ("bitcast", "convert", "copy"):
        return _repeats(computation, operands[0])
    if operation != "broadcast":
        return False
    last = line.partition("[")[2].partition("]")[0].count(",")
    kept = re.search(r"dimensions=\{([\d,]*)\}", line)
    return kept is not None and str(last) not in kept[1].split(",")


def compare(program: Program, dtype: str, eager: bool = True) -> dict[str, Any]:
    """Compile a program and compare its results with those of others.

    Args:
        program: a function and its arguments.
        dtype: dtype of the arguments, which determines what counts as rounding.
        eager: whether to compare with the function outside of `jax.jit` too.

    Returns:
        ``difference``, the largest one from the program without the fusions and from
        the eager function; ``right``, whether it is rounding; and
        ``constant_operands``.
    """
    function, arguments = program
    compiled = jax.jit(function).lower(*arguments).compile()
    results = compiled(*arguments)
    plain = jax.jit(function, compiler_options=NO_FUSIONS)(*arguments)
    largest = difference(results, plain)
    if eager:
        largest = max(largest, difference(results, function(*arguments)))
    rounding = largest <= TOLERANCE[dtype]
    return {
        "difference": largest,
        "right": rounding or _near_float64(program, dtype, results, plain),
        "constant_operands": constant_operands(compiled.as_text() or ""),
    }


def _near_float64(program: Program, dtype: str, results: Any, plain: Any) -> bool:
    """Whether each array is as near float64 as rounding, plain or eager ones are."""
    function, arguments = program
    eager = function(*arguments)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), arguments)
        exact = jax.device_get(jax.jit(function, compiler_options=NO_FUSIONS)(*wide))

    def near(got, plain, eager, exact):
        def error(x):
            return np.max(np.abs(np.asarray(x, np.float64) - exact))

        rounding = TOLERANCE[dtype] * np.max(np.abs(exact))
        return error(got) <= max(rounding, MORE_ERROR * max(error(plain), error(eager)))

    return all(map(near, *map(jax.tree.leaves, (results, plain, eager, exact))))


def cases(
    all_heads, shapes, dtype: Any
) -> Iterator[tuple[str, int, str, dict[str, Program]]]:
    """Every operation and mixer for every shape and number of heads."""
    for rows, tokens in shapes:
        for heads in all_heads:
            shape = f"{rows} rows of {tokens}"
            for name, (call, arrays) in operations(heads, rows, tokens, dtype).items():
                yield name, heads, shape, programs_of_operation(call, arrays)
            for name, cfg in mixer_configs(heads).items():
                programs = programs_of_mixer(cfg, rows, tokens, dtype)
                yield f"mixer {name}", heads, shape, programs


def main(
    only: str = "*",
    heads: tuple[int, ...] = HEADS,
    shapes: tuple[str, ...] = tuple(f"{rows},{tokens}" for rows, tokens in SHAPES),
    dtype: Literal["float32", "bfloat16"] = "float32",
    parts: tuple[str, ...] = PARTS,
    eager: bool = False,
    name: str = f"compiled_jax_{jax.__version__}",
) -> None:
    """Compare every case.

    Args:
        only: a glob of the names of operations and mixers.
        heads: numbers of heads.
        shapes: rows and tokens, such as "512,8".
        dtype: dtype of the inputs.
        parts: the programs to compile for each.
        eager: whether to compare with the functions outside of `jax.jit` too, except
            for gradients.
        name: name of the file of results.
    """
    sizes = [tuple(int(size) for size in shape.split(",")) for shape in shapes]
    wrong, largest, count, path = [], {}, 0, None
    compared: list[str] = []  # shapes, in their order
    for method, n_heads, shape, programs in cases(heads, sizes, dtype):
        for part in parts:
            if part not in programs or not fnmatch.fnmatch(method, only):
                continue
            result = compare(programs[part], dtype, eager and part != "gradient")
            count += 1
            before = largest.setdefault(method, {}).get(part, 0.0)
            largest[method][part] = max(before, result["difference"])
            if not result["right"] or result["constant_operands"]:
                wrong.append(
                    {
                        "method": method,
                        "heads": n_heads,
                        "shape": shape,
                        "part": part,
                        "difference": f"{result['difference']:.2g}",
                        "right": result["right"],
                        "constant_operands": len(result["constant_operands"]),
                    }
                )
                print(wrong[-1], flush=True)
        jax.clear_caches()
        if shape not in compared:
            compared.append(shape)
        grid = {"dtype": dtype, "heads": heads, "shapes": compared, "parts": parts}
        results = {"programs": count, "wrong": wrong, "largest_difference": largest}
        path = record(name, **grid, **results)
    print(f"{len(wrong)} of {count} programs are wrong or may be; written to {path}.")


if __name__ == "__main__":
    tyro.cli(main)
