"""Sound float64 arithmetic: bounds of singular values, rounding slack; linear solves and exponentials in batches."""
