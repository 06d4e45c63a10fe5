"""Training: the loop in plain torch, the checkpoint, the tracker, and Ray Train around them."""
