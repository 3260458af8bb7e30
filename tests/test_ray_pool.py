"""How a cluster is joined, without one. What workers do on a real one is in test_ray.py."""

import importlib
import logging
from typing import Any

import pytest
import ray

from batchgen import ray_pool
from batchgen.spec import ClusterSpec


def test_a_fresh_cluster_starts_without_a_warning_that_asks_for_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vendor = importlib.import_module(ray_pool.TOKEN_LOGGER).logger

    def start(**options: Any) -> None:
        assert options["address"] == "local"
        logging.getLogger("ray").warning("a warning of another kind")
        vendor.warning("token authentication is on")
        vendor.error("the token can't be read")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    handler = logging.StreamHandler()
    logging.getLogger("ray").addHandler(handler)
    try:
        ray_pool.connect(ClusterSpec(address="local"))
    finally:
        logging.getLogger("ray").removeHandler(handler)
        vendor.setLevel(logging.NOTSET)
    shown = capsys.readouterr().err
    assert "token authentication is on" not in shown
    assert "the token can't be read" in shown
    assert "a warning of another kind" in shown
