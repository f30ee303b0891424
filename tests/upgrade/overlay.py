"""Another version of vLLM on CPUs: its Python files, with the compiled libraries of the installed version.

The package index has each version for CUDA first, and for CPUs weeks later or never. Most changes that concern this
package are in Python, so they can be seen before.
"""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement

LIBRARIES = "*.so"
OMITTED = (".so", ".h", ".hpp", ".cu", ".cuh", ".cpp", ".inl", "/vllm-rs")
"""Ends of names in the wheel: compiled for CUDA, or sources for compilers at run time."""


def build(number: str, folder: Path, installed: Path) -> Path:
    """Download a version and unpack it; do nothing if that has been done.

    Args:
        number: the version.
        folder: gets the wheel, and a folder for `PYTHONPATH`.
        installed: the installed package, from whose folder the libraries are linked.

    Returns:
        The folder for `PYTHONPATH`.
    """
    target = folder / number
    if target.is_dir():
        return target
    with zipfile.ZipFile(_download(number, folder)) as wheel:
        unpacked = folder / f"{number}.partial"
        wheel.extractall(unpacked, [name for name in wheel.namelist() if not name.endswith(OMITTED)])
    for library in installed.rglob(LIBRARIES):
        link = unpacked / "vllm" / library.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)
    (metadata,) = unpacked.glob("vllm-*.dist-info/METADATA")  # vLLM recognizes a build for CPUs by its version
    metadata.write_text(re.sub(r"(?m)^(Version: .*)$", r"\1+cpu", metadata.read_text(), count=1))
    unpacked.rename(target)
    return target


def _download(number: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    subprocess.run([*command, f"vllm=={number}"], check=True, stdout=subprocess.DEVNULL, env=os.environ)
    return next(folder.glob(f"vllm-{number}-*.whl"))


def unmet_requirements(target: Path) -> list[str]:
    """Return the requirements of the version that the installed packages do not meet, with what is installed."""
    (info,) = target.glob("*.dist-info")
    unmet = []
    for text in distribution_requirements(info):
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not requirement.specifier.contains(found, prereleases=True):
            unmet.append(f"{requirement.name}{requirement.specifier} (here: {found})")
    return unmet


def distribution_requirements(info: Path) -> list[str]:
    """Return the requirements in the metadata of an unpacked wheel."""
    return distribution("pip").at(info).requires or []
