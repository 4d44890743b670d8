"""Sources -> canonical tables -> batches."""
