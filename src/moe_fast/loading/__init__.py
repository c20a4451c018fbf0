"""A design in the training script: its tensors in torch, its weights in a model's parameters."""
