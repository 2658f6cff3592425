"""Everything that computes on the device: networks, inner loops, meta-gradients, training, evaluation."""
