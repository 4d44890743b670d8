"""Statistics: of examples alone (`bootstrap`), and of seeds and examples together (`means`)."""

from peftkit.stats.bootstrap import bootstrap_counts, bootstrap_scores

__all__ = ["bootstrap_counts", "bootstrap_scores"]
