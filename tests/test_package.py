"""Releases: one version everywhere, modules that can be imported, and complete distributions."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import yaml

import nli_sft

ROOT = Path(__file__).parents[1]
SHIPPED = ("nli_sft", "recipes", "accelerate_configs", "docs", "tests", ".ci")


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert nli_sft.__version__ == newest
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == newest


def test_every_module_can_be_imported_from_elsewhere(tmp_path):
    code = (
        "import importlib, pkgutil, sys, nli_sft\n"
        "assert 'torch' not in sys.modules, 'import nli_sft must stay cheap'\n"
        "names = [module.name for module in pkgutil.walk_packages(nli_sft.__path__, 'nli_sft.')]\n"
        "for name in names:\n"
        "    importlib.import_module(name)\n"
        "assert nli_sft.NLIClassifier is nli_sft.classifier.NLIClassifier\n"
        "print(len(names))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) > 20


def test_a_source_distribution_is_complete(tmp_path):
    """Build from a copy, since a build leaves files that the next one would include."""
    source, made = tmp_path / "source", tmp_path / "made"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.name in SHIPPED:
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(made)!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (archive,) = made.glob(f"nli_sft-{nli_sft.__version__}.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    there = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    missing = {path for path in there - packed if "egg-info" not in path}
    assert not missing
    assert {"nli_sft/py.typed", "recipes/sft.py", "docs/trie.svg", "CITATION.cff", "LICENSE"} <= packed
