"""The first home of `SamplingParams`, by which older saved configs name it."""

import dataclasses

from jaxlab import decoding


@dataclasses.dataclass(frozen=True)
class SamplingParams(decoding.SamplingParams):
    """Settings that were saved when the class was defined in this module."""
