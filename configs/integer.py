"""A language model in int8 only, trained by a population's votes without a gradient.

Data: the standard library of the running Python, as bytes; 5% of the files held out.
Paper: Sarkar et al., Evolution Strategies at the Hyperscale, arXiv 2511.16652.
Expected: about 4.3 bits per byte after 300 generations of 1024 members (unigram 4.55,
bigram 3.44); docs/results/evolution.md compares sizes of the population.
Command: python scripts/train.py configs/integer.py
"""

from jaxlab.evolution.integer import IntegerEGGROLL
from jaxlab.training.problems import IntegerTraining, SearchConfig

config = SearchConfig(
    name="integer",
    task=IntegerTraining(es=IntegerEGGROLL(population=1024, members_per_sequence=16)),
    steps=300,
    eval_every=50,
)
