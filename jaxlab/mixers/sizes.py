"""Checks of sizes that the mixers' Configs share."""

from typing import Any


def check_sizes(cfg: Any, *names: str) -> None:
    """Check that every named size is at least 1 or None.

    Raises:
        ValueError: a size is below 1.
    """
    for name in names:
        size = getattr(cfg, name)
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} must be at least 1.")


def check_heads(cfg: Any, size_field: str) -> None:
    """Check that the heads divide the width, unless the size of a head is given.

    Args:
        cfg: a config with `width` and `n_heads`.
        size_field: the name of the field for the size of a head, which is None if the
            width determines it.

    Raises:
        ValueError: the number of heads does not divide the width.
    """
    if getattr(cfg, size_field) is None and cfg.width % cfg.n_heads:
        raise ValueError(
            f"width={cfg.width} is not divisible by n_heads={cfg.n_heads}; choose "
            f"another number of heads or set {size_field}."
        )
