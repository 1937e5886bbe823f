"""Sums by GRPO, a policy gradient, to compare with configs/sums_eggroll.py.

A step is 2048 answers: 8 samples for each of 256 questions.

Paper: Shao et al., DeepSeekMath, arXiv 2402.03300.
Expected: see docs/results/evolution.md.
Command: make train, then python scripts/train.py configs/sums_grpo.py
"""

from jaxlab.rl import GRPO, Sums
from jaxlab.training.problems import FineTuning, SearchConfig

config = SearchConfig(
    name="sums_grpo",
    task=FineTuning(
        init_from="runs/tiny",
        questions=Sums(largest=9, digits=1, end=""),
        method=GRPO(group=8),
        questions_a_step=256,
    ),
    steps=150,
)
