"""Fast paths of the training step, in plain PyTorch: each computes what the model's own modules compute.

They replace how modules compute, never what modules there are: names, parameters and state dicts stay as they were.
"""
