"""Sound float64 arithmetic: bounds of singular values, rounding slack, linear solves."""
