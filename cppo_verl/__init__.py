"""CPPO: cumulative prefix-divergence policy optimisation (arXiv 2606.10968), as a verl plug-in.

Importing this package needs torch only. The maths stands here; ``cppo_verl.plugin`` is what verl
loads through its entry point.
"""

from cppo_verl.divergence import binary_divergence, exact_divergence, partition_divergence, top_k_divergence
from cppo_verl.surrogate import (
    clipped_weight,
    masked_surrogate,
    mean_prefix_ratio,
    minimum_prefix_ratio,
    surrogate_weight,
)
from cppo_verl.trust_region import (
    TrustRegion,
    adaptive_budget,
    masked_quantile,
    position_weights,
    response_mask_by_divergence,
    shuffled_weights,
    trust_region,
    update_mask,
    violation,
)

__version__ = "0.1.0"

__all__ = [
    "TrustRegion",
    "adaptive_budget",
    "binary_divergence",
    "clipped_weight",
    "exact_divergence",
    "masked_quantile",
    "masked_surrogate",
    "mean_prefix_ratio",
    "minimum_prefix_ratio",
    "partition_divergence",
    "position_weights",
    "response_mask_by_divergence",
    "shuffled_weights",
    "surrogate_weight",
    "top_k_divergence",
    "trust_region",
    "update_mask",
    "violation",
]
