"""Pendulum by EGGROLL: a network with bounded torques learns to swing up and hold.

Paper: Sarkar et al., Evolution Strategies at the Hyperscale, arXiv 2511.16652.
Expected: a mean return of about -160 after 140 generations, in two minutes on two CPU
cores (random torques reach about -1200; the swing itself costs about 150).
Command: python scripts/train.py configs/pendulum.py
"""

from jaxlab.environments import Pendulum
from jaxlab.evolution import EGGROLL
from jaxlab.training.problems import PolicySearch, SearchConfig

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
