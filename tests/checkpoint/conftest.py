"""Fixtures of the checkpoint tests."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def collected():
    """Collects what a file's tests dropped before those of the next begin."""
    yield
    gc.collect()
