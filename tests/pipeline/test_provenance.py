"""What provenance.json and the manifests say about limbeck's own code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from limbeck.pipeline.provenance import code_revision

ROOT = Path(__file__).resolve().parents[2]


def test_the_revision_is_that_of_the_checkout() -> None:
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("the tests do not run in a git checkout")
    revision = code_revision()
    assert revision is not None and git.stdout.startswith(revision.removesuffix("-dirty").rpartition("-g")[2])
