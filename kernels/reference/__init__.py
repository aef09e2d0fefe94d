"""Plain PyTorch definitions of the ops: what the tests call truth, in float64."""
