"""Pendulum by EGGROLL: swing up and hold, by torques of a bounded network.

Paper: Sarkar et al., Evolution Strategies at the Hyperscale, arXiv 2511.16652.
Expected: a mean return above -250 (random actions have about -1200; nothing is above
about -150, because the swing itself costs).
Command: python scripts/evolve.py configs/pendulum.py
"""

from jaxlab.environments import Pendulum
from jaxlab.evolution import EGGROLL
from jaxlab.training.search import PolicySearch, SearchConfig

config = SearchConfig(
    name="pendulum",
    task=PolicySearch(
        environment=Pendulum(),
        es=EGGROLL(population=1024, sigma=0.05, rank=1),
        episodes=4,
        eval_episodes=64,
    ),
    steps=150,
    eval_every=10,
)
