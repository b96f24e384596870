"""Operators of ONNX in torch, in the memory formats that training gives them."""

import subprocess
import sys

GRADIENT = """
import torch
from compress.quantize.qat.operators import conv

torch.manual_seed(0)
x = torch.randn(8, 3, 32, 32)
last = x.contiguous(memory_format=torch.channels_last)
for _ in range(4):
    found = []
    for images in (x, last):
        weight = torch.nn.Parameter(torch.ones(48, 3, 1, 1))
        out = conv({"strides": [2, 2]}, images, weight)
        out.backward(torch.ones_like(out))
        found.append(weight.grad)
    torch.testing.assert_close(*found)
"""


def test_the_gradient_of_a_strided_1x1_convolution_is_right_in_channels_last():
    done = subprocess.run([sys.executable, "-c", GRADIENT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]
