"""Sequence mixers: one method, one file, the same five functions.

    Config                                             frozen dataclass, width first
    spec(cfg) -> dict of ParamSpec
    init_state(cfg, batch, max_length) -> state        before the first token
    forward(params, x [B,T,width], cfg, *, state=None, segment_ids=None) -> (y, state)
    step(params, x [B,width], cfg, state) -> (y, state)

and, where training needs a loss of the mixer's own (already weighted), a sixth:

    auxiliary_loss(params, x [B,T,width], cfg, *, segment_ids=None) -> scalar

The contract, proven for every mixer in ``tests/mixers/test_laws.py``:

- `forward` equals a scan of `step`; without a state it starts from nothing and returns
  None for the state, with one it continues and returns the state after the last token.
- Causal: a token's output depends on itself and earlier tokens of its document.
- ``segment_ids [B,T]``: a change of id starts a new document. A given state belongs to
  the first document of each row; the state returned is that of the last. Ids below 0
  are padding at either end of a row, which touches no state.
"""

from types import ModuleType
from typing import Any

from jaxlab.mixers import (
    aaren,
    attention,
    delta_product,
    gla,
    lact,
    mamba,
    mamba2,
    mom,
    retnet,
)

MIXERS: dict[str, ModuleType] = {
    "aaren": aaren,
    "attention": attention,
    "delta_product": delta_product,
    "gla": gla,
    "lact": lact,
    "mamba": mamba,
    "mamba2": mamba2,
    "mom": mom,
    "retnet": retnet,
}
"""Every mixer by name; a new one is one more row here and in `MixerConfig`."""

MixerConfig = (
    aaren.Config
    | attention.Config
    | delta_product.Config
    | gla.Config
    | lact.Config
    | mamba.Config
    | mamba2.Config
    | mom.Config
    | retnet.Config
)


def mixer_of(cfg: Any) -> ModuleType:
    """The module whose `Config` `cfg` is.

    Raises:
        TypeError: it belongs to no mixer.
    """
    for module in MIXERS.values():
        if isinstance(cfg, module.Config):
            return module
    raise TypeError(
        f"{cfg!r} is not the Config of a mixer; the mixers are {sorted(MIXERS)}."
    )


__all__ = [
    "MIXERS",
    "MixerConfig",
    "aaren",
    "attention",
    "delta_product",
    "gla",
    "lact",
    "mamba",
    "mamba2",
    "mixer_of",
    "mom",
    "retnet",
]
