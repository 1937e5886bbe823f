"""Sums by EGGROLL: the model of `make train` learns sums from right and wrong alone.

A question is "(3, 4, ", and the answer is right if it is "7". At the start, 13% of the
model's most likely answers are right. A generation is 2048 answers: 128 members each
answer the same 16 questions. A step of configs/sums_grpo.py has as many answers.

Paper: Sarkar et al., Evolution Strategies at the Hyperscale, arXiv 2511.16652.
Expected: see docs/results/evolution.md.
Command: make train, then python scripts/train.py configs/sums_eggroll.py
"""

import dataclasses

from jaxlab.evolution import EGGROLL
from jaxlab.rl import Sums
from jaxlab.training.problems import ADAM, FineTuning, SearchConfig

config = SearchConfig(
    name="sums_eggroll",
    task=FineTuning(
        init_from="runs/tiny",
        questions=Sums(largest=9, digits=1, end=""),
        method=EGGROLL(population=128, sigma=0.02, members_at_once=32),
        optimizer=dataclasses.replace(ADAM, learning_rate=4e-3, clip=1.0),
        questions_a_step=16,
        temperature=1.0,
    ),
    steps=150,
)
