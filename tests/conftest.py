"""Loads the fixtures of `tests.plugin` into the processes that run tests."""

from __future__ import annotations

import os

if not os.environ.get("KIT_TEST_GPU"):  # tests but those of tests/gpu are about the CPU, also where there is a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_configure(config):
    """Passes by the process that only hands out tests to others, which wait while it would import torch and Lightning."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.plugin")
