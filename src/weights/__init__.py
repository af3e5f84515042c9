"""Files of weights: written whole, loaded without running anything, ours and those of others."""
