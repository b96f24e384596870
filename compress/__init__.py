"""Prune, distill and quantize trained CNNs, export them to engines, and prove what it did."""
