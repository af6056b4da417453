"""The maths of CPPO and its neighbours: pure functions of tensors and numbers that need torch only."""

from cppo_verl.core.divergence import binary_divergence, partition_divergence, top_k_divergence
from cppo_verl.core.neighbours import kpop_mask, vaco_mask
from cppo_verl.core.surrogate import (
    clipped_weight,
    masked_surrogate,
    mean_prefix_ratio,
    minimum_prefix_ratio,
    surrogate_weight,
)
from cppo_verl.core.trust_region import (
    TrustRegion,
    adaptive_budget,
    build_trust_region,
    masked_quantile,
    position_weights,
    response_mask_by_divergence,
    shuffled_weights,
    update_mask,
    violation,
)

__all__ = [
    "TrustRegion",
    "adaptive_budget",
    "binary_divergence",
    "build_trust_region",
    "clipped_weight",
    "kpop_mask",
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
    "update_mask",
    "vaco_mask",
    "violation",
]
