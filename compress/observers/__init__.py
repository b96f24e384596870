"""From what was seen of a tensor to the range it is quantized to."""
