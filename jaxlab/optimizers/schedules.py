"""Settings of learning-rate schedules; each builds an optax schedule for a run.

All schedules rise linearly from 0 over `warmup` steps and end at ``end * peak``.
"""

import dataclasses

import optax

from jaxlab.optimizers.settings import PERIOD, STEPS, Range, check

FRACTION = Range("in [0, 1]", "it is a fraction of the peak", least=0.0, most=1.0)
PART = Range("in [0, 1]", "it is a fraction of the run's steps", least=0.0, most=1.0)
RANGES = {
    "warmup": STEPS,
    "end": FRACTION,
    "decay": PART,
    "cycles": Range(
        "a whole number, at least 1", "1 is one rise and fall", least=1.0, whole=True
    ),
    "cooldown": PERIOD,
    "constant": FRACTION,
    "anneal": PART,
    "steps": Range(
        "a whole number, at least 1",
        "it is the length of the run",
        least=1.0,
        whole=True,
    ),
}


def _check(schedule, steps: int, cycles: int = 1):
    check(RANGES, steps=steps)
    steps //= cycles
    if not schedule.warmup < steps:
        raise ValueError(
            f"warmup={schedule.warmup} steps do not fit into a run of {steps}; "
            "set a shorter warmup or more steps."
        )


@dataclasses.dataclass(frozen=True)
class WarmupCosine:
    """Warm up, then fall along half a cosine until the last step."""

    warmup: int = 100  # steps
    end: float = 0.1  # last rate over the peak

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, peak: float, steps: int) -> optax.Schedule:
        """The schedule for a run of `steps` whose highest rate is `peak`."""
        _check(self, steps)
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, self.warmup, steps, self.end * peak
        )


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay:
    """Warm up, stay constant, then fall linearly over the last part of the run.

    A run can be extended from a checkpoint of the constant part.

    Reference: Hu et al., "MiniCPM", arXiv 2404.06395.
    """

    warmup: int = 100  # steps
    decay: float = 0.2  # fraction of the run over which the rate falls
    end: float = 0.0  # last rate over the peak

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, peak: float, steps: int) -> optax.Schedule:
        """The schedule for a run of `steps` whose highest rate is `peak`."""
        _check(self, steps)
        falling = round(self.decay * steps)
        if self.warmup + falling > steps:
            raise ValueError(
                f"warmup={self.warmup} and decay={self.decay} of {steps} steps "
                f"({falling}) overlap; shorten one of them."
            )
        warmed = optax.linear_schedule(0.0, peak, self.warmup)
        parts, edges = [warmed, optax.constant_schedule(peak)], [self.warmup]
        if falling:  # without, one program serves runs of any length
            parts.append(optax.linear_schedule(peak, self.end * peak, falling))
            edges.append(steps - falling)
        return optax.join_schedules(parts, edges)


@dataclasses.dataclass(frozen=True)
class Rewarming:
    """`cycles` times: warm up from the last rate to the peak, then fall along a cosine.

    For continued training on new data, with one cycle for each data set.

    Reference: Gupta et al., "Continual Pre-Training of Large Language Models: How to
    (re)warm your model?", arXiv 2308.04014.
    """

    warmup: int = 100  # steps of each cycle
    cycles: int = 2
    end: float = 0.1  # last rate of each cycle over the peak

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, peak: float, steps: int) -> optax.Schedule:
        """The schedule for a run of `steps` whose highest rate is `peak`."""
        _check(self, steps, self.cycles)
        edges = [round(i * steps / self.cycles) for i in range(self.cycles + 1)]
        cycles: list[dict] = [
            dict(
                init_value=self.end * peak if i else 0.0,
                peak_value=peak,
                warmup_steps=self.warmup,
                decay_steps=edges[i + 1] - edges[i],
                end_value=self.end * peak,
            )
            for i in range(self.cycles)
        ]
        return optax.sgdr_schedule(cycles)


@dataclasses.dataclass(frozen=True)
class Infinite:
    """Warm up, fall along a cosine to a constant rate, then fall exponentially.

    A run can be extended from a checkpoint of the constant part, also on new data: only
    the exponential part, which yields the model to be used, depends on the run's end.

    Reference: Singh et al., "Beyond Cosine Decay: On the effectiveness of Infinite
    Learning Rate Schedule for Continual Pre-training", arXiv 2503.02844.
    """

    warmup: int = 100  # steps
    cooldown: int = 500  # steps from the peak to the constant rate
    constant: float = 0.55  # constant rate over the peak
    anneal: float = 0.2  # fraction of the run over which the rate falls exponentially
    end: float = 0.1  # last rate over the peak; above 0

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, peak: float, steps: int) -> optax.Schedule:
        """The schedule for a run of `steps` whose highest rate is `peak`."""
        _check(self, steps)
        if not 0 < self.end <= self.constant <= 1:
            raise ValueError(
                f"end={self.end} and constant={self.constant} must be fractions of the "
                "peak with 0 < end <= constant <= 1; an exponential never reaches 0."
            )
        falling = round(self.anneal * steps)
        if self.warmup + self.cooldown + falling > steps:
            raise ValueError(
                f"warmup={self.warmup}, cooldown={self.cooldown} and "
                f"anneal={self.anneal} of {steps} steps ({falling}) overlap; shorten "
                "one of them."
            )
        parts = [
            optax.linear_schedule(0.0, peak, self.warmup),
            optax.cosine_decay_schedule(peak, self.cooldown, alpha=self.constant),
            optax.constant_schedule(self.constant * peak),
            optax.exponential_decay(
                self.constant * peak,
                falling,
                self.end / self.constant,
                end_value=self.end * peak,
            ),
        ]
        edges = [self.warmup, self.warmup + self.cooldown, steps - falling]
        return optax.join_schedules(parts, edges)


Schedule = WarmupCosine | WarmupStableDecay | Rewarming | Infinite
