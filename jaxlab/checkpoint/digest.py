"""A digest of an array's values that does not depend on sharding or devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32


@jax.jit
def digest(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Return a 32-bit digest of the values of an array, whatever its sharding.

    sum_i mix(w_i XOR mix(i)) mod 2^32, over the words w_i at flat positions i. `mix`
    is a bijection, so a change of one word always changes the sum; any other change,
    such as two words swapped, goes unseen with a probability of 2^-32. An integer sum
    does not depend on its order, and so not on the devices that compute it.

    Args:
        x: of any dtype except PRNG keys.

    Returns:
        The digest, replicated.
    """
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if jnp.issubdtype(x.dtype, jnp.floating):
        word = {8: jnp.uint8, 16: jnp.uint16}.get(jnp.finfo(x.dtype).bits, jnp.uint32)
        x = jax.lax.bitcast_convert_type(x, word)
    elif x.dtype.itemsize == 8:
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)  # appends an axis of 2
    words = x.astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        i = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position * jnp.uint32(size % 2**32) + i
    return jnp.sum(_mix(words ^ _mix(position)), dtype=jnp.uint32)


def digests(arrays: dict[str, Array]) -> dict[str, int]:
    """Return the digest of every array, a number in [0, 2^32)."""
    values = jax.device_get({name: digest(x) for name, x in arrays.items()})
    return {name: int(value) for name, value in values.items()}


def _mix(h: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finalizer of MurmurHash3: every bit of h reaches every bit of the result."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
