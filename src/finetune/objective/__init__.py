"""What the network learns: noise process, parametrisation, level sampler, weighting, and the loss they make.

Knows no UNet, only `network(x_t, timestep) -> output`. A new objective is added here (its piece, and its case in
build.py) and in the configuration; the training loop stays as it is.
"""

from finetune.objective.build import build_objective, without_own_code
from finetune.objective.likelihood import bits_per_dim
from finetune.objective.objective import LossTerms, Network, Objective

__all__ = ["LossTerms", "Network", "Objective", "bits_per_dim", "build_objective", "without_own_code"]
