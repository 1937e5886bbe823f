"""What paged attention says to a caller's mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.cases import paged_attention as cases
from pallas_kernels import programs
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.platform import interpreted_tpu


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def integers(*values):
    return jnp.array(values, jnp.int32)


def arguments(**changed):
    """Tq 5, Hq 4, D 8, P 6, page 3, Hkv 2, S 2, pages_per_seq 4."""
    good = {
        "q": ones(5, 4, 8),
        "k_pages": ones(6, 3, 2, 8),
        "v_pages": ones(6, 3, 2, 8),
        "page_table": integers([0, 1, 2, 99], [3, 4, 99, 99]),
        "kv_lens": integers(8, 4),
        "cu_q_lens": integers(0, 1, 5),
    }
    return good | changed


ARRAYS = tuple(arguments())
NAN = float("nan")
INT8 = {name: ones(6, 3, 2, 8, dtype=jnp.int8) for name in ("k_pages", "v_pages")}
VALUE_ERRORS = [
    ({"q": ones(5, 4)}, r"q has shape \(5, 4\), .* axes \[Tq, Hq, D\]"),
    ({"k_pages": ones(6, 3, 2, 9)}, r"k_pages has shape .* with D = 8 as in q"),
    ({"v_pages": ones(6, 3, 1, 8)}, r"v_pages has .* with Hkv = 2 as in k_pages"),
    ({"k_pages": ones(6, 3, 0, 8)}, "k_pages has .* at least one entry"),
    ({"q": ones(5, 3, 8)}, "q has 3 heads and k_pages 2, .* a multiple of Hkv"),
    ({"kv_lens": integers(8)}, r"kv_lens has shape \(1,\), .* S = 2 as in page_table"),
    ({"cu_q_lens": integers(0, 1)}, r"cu_q_lens has .* S \+ 1 = 3 as in kv_lens"),
    ({"cu_q_lens": integers(1, 1, 5)}, r"cu_q_lens is \[1, 1, 5\], .* rise from 0"),
    ({"cu_q_lens": integers(0, 4, 3)}, r"cu_q_lens is \[0, 4, 3\], .* falling"),
    ({"cu_q_lens": integers(0, 1, 6)}, r"cu_q_lens is .* at most Tq = 5"),
    ({"kv_lens": integers(8, 13)}, r"kv_lens is \[8, 13\], .* page = 12 keys"),
    ({"kv_lens": integers(-1, 4)}, r"kv_lens is \[-1, 4\], .* between 0"),
    (
        {"kv_lens": integers(8, 7)},
        r"page_table\[1, 2\] is 99, but sequence 1 has 7 keys",
    ),
    ({"kv_lens": integers(8, 3)}, "sequence 1 has 4 queries and 3 keys, but kv_lens"),
    (INT8, "the pages are int8 and k_scale is None, .* divided by"),
    (INT8 | {"k_scale": 0.1}, "the pages are int8 and v_scale is None"),
    ({"v_scale": 0.1}, "v_scale is given, but the pages are float32, .* leave it out"),
    (INT8 | {"k_scale": NAN, "v_scale": 0.1}, "k_scale is nan, .* must be finite"),
    ({"scale": NAN}, "scale is nan, but it must be finite"),
    ({"scale": float("inf")}, "scale is inf, but it must be finite"),
    ({"scale": ones(4)}, r"scale has shape \(4,\), but it must be one number"),
    ({"scale": [1.0]}, r"scale has shape \(1,\), but it must be one number"),
    (
        {"k_scale": ones(6, 3)},
        r"k_scale has .* the 3 axes \[P, page, Hkv\] or a scalar",
    ),
    ({"v_scale": ones(6, 3, 4)}, "v_scale has shape .* with Hkv = 2"),
    ({"window": 0}, "window is 0, but a query sees at least itself"),
    ({"soft_cap": -1.0}, "soft_cap is -1.0, but it must be above 0"),
    ({"soft_cap": float("inf")}, "soft_cap is inf, .* None leaves the scores"),
    ({"implementation": "cuda"}, "no implementation 'cuda'; choose one of"),
    ({"implementation": 1}, "no implementation 1; choose one of"),
    ({"implementation": ["xla"]}, r"no implementation \['xla'\]; choose one of"),
    ({"implementation": max}, "no implementation <built-in function max>; choose"),
    ({"kv_lens": 8}, r"kv_lens has shape \(\), .* the 1 axes \[S\]"),
    ({"page_table": integers(0, 1)}, r"page_table has .* 2 axes \[S, pages_per_seq\]"),
]
TYPE_ERRORS = [
    ({"q": ones(5, 4, 8, dtype=jnp.float16)}, "q has dtype float16, .* bfloat16"),
    ({"q": ones(5, 4, 8, dtype=jnp.int8)}, "q has dtype int8, .* float32"),
    ({"k_pages": ones(6, 3, 2, 8, dtype=jnp.float16)}, "k_pages has dtype float16"),
    (
        {"v_pages": ones(6, 3, 2, 8, dtype=jnp.int8)},
        "k_pages has .* float32 and v_pages",
    ),
    ({"kv_lens": ones(2)}, "kv_lens has dtype float32, but it must hold integers"),
    ({"k_scale": ones(6, 3, 2, dtype=int)}, "k_scale has dtype int32, .* float32"),
    ({"window": 4.0}, "window is 4.0, but it must be an int"),
    ({"soft_cap": "high"}, "soft_cap is 'high', but it must be a float"),
    ({"scale": "half"}, "scale is of type str and makes no array of numbers"),
    ({"scale": 1j}, "scale has dtype complex64, but it must be a real number"),
    ({"scale": True}, "scale has dtype bool, but it must be a real number"),
    ({"return_log_sum_exp": "no"}, "return_log_sum_exp is 'no', .* True or False"),
    ({"q": {}}, "q is of type dict and makes no array of numbers; give a jax.Array"),
    ({"page_table": [[0, 1, 2], [3, 4]]}, "page_table is of type list and makes no"),
    *[({name: None}, f"{name} is None, but it must be an array") for name in ARRAYS],
]


@pytest.mark.parametrize("changed, message", VALUE_ERRORS)
def test_wrong_values(changed, message):
    with pytest.raises(ValueError, match="paged_attention.*" + message):
        paged_attention(**arguments(**changed))


@pytest.mark.parametrize("changed, message", TYPE_ERRORS)
def test_wrong_types(changed, message):
    with pytest.raises(TypeError, match="paged_attention.*" + message):
        paged_attention(**arguments(**changed))


KNOWN = [
    ("cu_q_lens", [0, 4, 3], "cu_q_lens is .* without falling"),
    ("kv_lens", [8, 13], "kv_lens is .* page = 12 keys"),
    ("kv_lens", [8, 3], "sequence 1 has 4 queries and 3 keys"),
    ("page_table", [[0, 6, 2, 9], [3, 4, 9, 9]], r"page_table\[0, 1\] is 6"),
]


@pytest.mark.parametrize("dtype", (np.int32, np.uint32))
@pytest.mark.parametrize(("name", "value", "message"), KNOWN)
def test_what_is_known_is_checked_where_the_queries_are_traced(
    name, value, message, dtype
):
    integers = {n: np.asarray(x) for n, x in arguments().items() if x.dtype == "int32"}
    integers[name] = np.array(value, dtype)

    def call(q):
        return paged_attention(**arguments(q=q, **integers))

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, ones(5, 4, 8))


def test_a_known_length_is_checked_where_the_table_is_traced():
    def call(table, lengths):
        return paged_attention(**arguments(page_table=table, kv_lens=lengths))

    table = arguments()["page_table"]
    assert jax.eval_shape(call, table, np.array([8, 13])).shape == (5, 4, 8)
    with pytest.raises(ValueError, match="kv_lens is .* page = 12 keys"):
        jax.eval_shape(lambda table: call(table, np.array([8, 13])), table)


def right(**changed):
    """The shape of the result of arguments that are right."""
    call = functools.partial(paged_attention, **arguments(**changed))
    return jax.eval_shape(call).shape


def test_the_arguments_of_these_tests_are_right():
    assert paged_attention(**arguments()).shape == (5, 4, 8)


def test_arguments_that_are_taken():
    as_lists = {n: np.asarray(x).tolist() for n, x in arguments().items()}
    float8 = {name: x.astype(jnp.float8_e4m3fn) for name, x in INT8.items()}
    scales = {"k_scale": 0.1, "v_scale": ones(6, 3, 2)}
    for changed in (as_lists, INT8 | scales, float8, float8 | scales):
        assert right(**changed) == (5, 4, 8)
    assert right(kv_lens=integers(8, 0)) == (5, 4, 8)  # it waits without keys


def test_the_gpu_kernel_is_for_hopper():
    with pytest.raises(
        NotImplementedError, match="'pallas_gpu': its GPU kernel runs on a Hopper GPU"
    ):
        paged_attention(**arguments(implementation="pallas_gpu"))


def test_the_tpu_kernel_names_the_platform():
    arrays = cases.draw([(1, 20)], cases.Heads(4, 2, 64, 16))
    message = "'pallas_tpu': its TPU kernel runs on a TPU"
    with pytest.raises(NotImplementedError, match=message):
        paged_attention(**arrays, implementation="pallas_tpu")


def shapes(heads=(4, 2, 64, 16), room=(8, 8, 64, 8), dtype="float32"):
    call, shapes = programs.paged_attention(heads, room, dtype)
    return jax.eval_shape(call, *shapes)


MISFITS = [
    ({"heads": (4, 2, 80, 16)}, "heads have size 80, .* 128 is the nearest"),
    ({"heads": (4, 2, 512, 16)}, "heads have size 512, .* 256 is the nearest"),
    ({"heads": (4, 2, 64, 8)}, "a page has 8 tokens, .* 16 is the nearest"),
    ({"heads": (4, 2, 64, 1024)}, "a page has 1024 tokens, .* 256 is the nearest"),
    (
        {"heads": (256, 256, 256, 256)},
        "256 heads .* bytes of VMEM .* at most 20 a device",
    ),
    (
        {"room": (256, 256, 64, 2048)},
        r"page_table \[256, 2048\] takes 2097152 bytes .* pages of 64 tokens or at",
    ),
    (
        {"heads": (4, 2, 64, 256), "room": (8, 8, 64, 2**18)},
        "; use at most 0 sequences",
    ),
]


@pytest.mark.parametrize("changed, message", MISFITS)
def test_the_tpu_kernel_names_its_limits(changed, message):
    with interpreted_tpu():
        with pytest.raises(NotImplementedError, match=message):
            shapes(**changed)
        assert shapes().shape == (8, 4, 64)


def test_the_tpu_kernel_has_no_float64():
    with jax.enable_x64(), interpreted_tpu():
        with pytest.raises(NotImplementedError, match="float64, which a TPU does not"):
            shapes(dtype="float64")


def test_no_gradient_where_it_would_not_work():
    def loss(q):
        return paged_attention(**arguments(q=q), implementation="xla").sum()

    with pytest.raises(
        NotImplementedError, match="no gradient; .* implementation='reference'"
    ):
        jax.grad(loss)(ones(5, 4, 8))
