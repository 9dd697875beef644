"""Importing kit."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# As the CUDA wheel does beside a CPU torch: it counts on operators that nothing declares.
TORCHVISION = """
import torch
try:
    torch._C._dispatch_find_schema_or_throw("torchvision::nms", "")
except RuntimeError:
    raise RuntimeError("operator torchvision::nms does not exist") from None
"""


def test_commands_that_do_not_train_do_without_lightning():
    """Importing it takes longer than making a video."""
    modules = "kit.verbs.generate, kit.prepare.run, kit.evaluation.report, kit.data.clips"
    code = f"import sys, {modules}; print({{'lightning', 'torchmetrics'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "set()"


def test_what_kit_and_its_tests_need_has_a_version_in_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["test"]
    names = {re.match(r"[\w-]+", line)[0] for line in needed if "== 'win32'" not in line}
    fixed = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    assert {name.lower() for name in names} <= {name.lower() for name in fixed}


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here, torchvision needs no help")
def test_torchvision_built_for_cuda_does_not_break_the_import(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(TORCHVISION)
    words = [sys.executable, "-c", "import kit, torchvision; print('imported')"]
    run = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert run.stdout.strip() == "imported", run.stderr
