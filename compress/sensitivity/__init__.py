"""Which layers bear it: pruned or quantized one by one, and a budget spent by what that showed."""
