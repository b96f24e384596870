"""Networks that ask for the version of their modules load from files of tensors."""

import torch
from torch import nn

from compress.models.weights import fit


class Versioned(nn.Module):
    """As torchvision's MNASNet: what has no version is refused."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def _load_from_state_dict(self, state, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


def test_the_version_of_a_module_is_its_own_where_the_file_has_none():
    network = Versioned()
    fit(network, {name: torch.ones_like(t) for name, t in network.state_dict().items()}, where="x")
    assert (network.layer.weight == 1).all()
