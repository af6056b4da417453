"""CPPO: cumulative prefix-divergence policy optimisation (arXiv 2606.10968), as a verl plug-in.

Importing this package needs torch only. The maths stands here; ``cppo_verl.plugin`` is what verl
loads through its entry point.
"""

from cppo_verl.divergence import binary_divergence, exact_divergence, partition_divergence, top_k_divergence
from cppo_verl.surrogate import masked_surrogate
from cppo_verl.trust_region import (
    TrustRegion,
    adaptive_budget,
    masked_quantile,
    position_weights,
    trust_region,
    update_mask,
    violation,
)

__version__ = "0.1.0"

__all__ = [
    "TrustRegion",
    "adaptive_budget",
    "binary_divergence",
    "exact_divergence",
    "masked_quantile",
    "masked_surrogate",
    "partition_divergence",
    "position_weights",
    "top_k_divergence",
    "trust_region",
    "update_mask",
    "violation",
]
