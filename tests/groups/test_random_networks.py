"""Networks that nobody chose: cut, exported, quantized for three runtimes, reloaded, trained."""

import os

import pytest
from random_networks import TARGETS, checked, drawn, shrunk

NUMBER = int(os.environ.get("COMPRESS_RANDOM_NETWORKS", "200"))  # 5000: a night


@pytest.mark.slow
def test_random_networks(tmp_path, tried):
    found = checked(range(2), tmp_path)
    assert all(set(each["sqnr_db"]) == set(TARGETS) for each in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, NUMBER, 4))
def test_many_random_networks(first, tmp_path, tried):
    seeds = range(first, first + 4)
    found = checked(seeds, tmp_path)
    worst = min(min(each["sqnr_db"].values()) for each in found.values())
    tried(
        "random networks: cut = masked reference, ONNX = torch, int8 for 3 runtimes without "
        "findings, reloaded in a fresh process, one step of training"
        " (so many as `COMPRESS_RANDOM_NETWORKS` says; 200 if it is not set)",
        len(found),
        f"worst centred output {worst:.1f} dB",
    )


def test_a_failing_network_shrinks_to_the_block_that_fails(tmp_path, monkeypatch):
    import random_networks

    def check(options, folder):
        assert "Shuffle" not in options["blocks"], "no"
        if not options["blocks"].count("Residual"):
            raise ValueError

    monkeypatch.setattr(random_networks, "check", check)
    blocks = '[["Plain",6,1,1],["Shuffle",8,1,1],["Concat",6,2,2],["Shuffle",8,0,0]]'
    least = shrunk(drawn(0) | {"blocks": blocks}, AssertionError, tmp_path)
    assert least["blocks"] == '[["Shuffle", 8, 1, 1]]'
