"""References to networks in code."""

from compress import models
from compress.models import cifar


def test_a_reference_written_before_the_networks_moved_still_opens() -> None:
    former = "compress." + "networks:resnet8"
    model = models.load_model(former, num_classes=10)
    assert type(model) is type(cifar.resnet8())
