"""A training run: its options, everything before its first step, its loop, and how it ends."""
