"""Checks that the mixers' Configs share: a size's mistakes, told in sentences."""

from typing import Any


def check_sizes(cfg: Any, *names: str) -> None:
    """Every named size is at least 1, or None.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        size = getattr(cfg, name)
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} must be at least 1.")


def check_heads(cfg: Any, own: str) -> None:
    """The heads divide the width where a head has no size of its own.

    Args:
        cfg: has `width` and `n_heads`.
        own: the field of a head's own size, None where it comes from the width.

    Raises:
        ValueError: they do not.
    """
    if getattr(cfg, own) is None and cfg.width % cfg.n_heads:
        raise ValueError(
            f"width={cfg.width} is not divisible by n_heads={cfg.n_heads}; choose "
            f"another number of heads or set {own}."
        )
