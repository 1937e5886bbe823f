"""CartPole by EGGROLL: members that differ by matrices of rank one, and no gradient.

Paper: Sarkar et al., Evolution Strategies at the Hyperscale, arXiv 2511.16652.
Expected: 500 of 500 in every episode of an evaluation within 60 generations, in seconds
on two CPU cores (docs/results/evolution.md has the results for five seeds).
Command: python scripts/train.py configs/cartpole.py
With JAX_NUM_CPU_DEVICES=2 in front, each core evaluates half of the population.
"""

from jaxlab.environments import CartPole
from jaxlab.evolution import EGGROLL
from jaxlab.training.problems import PolicySearch, SearchConfig

config = SearchConfig(
    name="cartpole",
    task=PolicySearch(
        environment=CartPole(), es=EGGROLL(population=512, sigma=0.05, rank=1)
    ),
    steps=60,
    eval_every=1,
    until=500,
)
