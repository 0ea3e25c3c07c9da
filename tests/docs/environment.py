"""A virtual environment with requirements.txt alone, as `make train` makes it.

Its packages are links to those of the tests' environment, which are the same versions: making it
takes seconds and no download.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.ranks import ROOT


def make_environment(folder: Path, more: Sequence[str] = ()) -> Path:
    """Make the environment in `folder` and return its bin directory. `more`: packages besides."""
    venv.create(folder, symlinks=True)
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / python / "site-packages"
    scripts = folder / "bin"
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    for package in _with_dependencies([*pinned, *more], set()):
        _link(package, packages, scripts)
    (packages / "fgpt.pth").write_text(f"{ROOT}\n")
    _write_script(scripts / "fgpt", "from fgpt.cli import main\nimport sys\nsys.exit(main())\n")
    return scripts


def _with_dependencies(requirements: list[str], seen: set[str]) -> Iterator[Distribution]:
    """The distributions that pip installs for these requirements."""
    for text in requirements:
        requirement = Requirement(text)
        extras = sorted(requirement.extras)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if (key := f"{name}{extras}") in seen:
            continue
        seen.add(key)
        found = distribution(name)
        yield found
        for line in found.requires or []:
            needed = Requirement(line)
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *extras]):
                needed.marker = None
                yield from _with_dependencies([str(needed)], seen)


def _link(package: Distribution, packages: Path, scripts: Path) -> None:
    """Link a distribution's modules and metadata, and copy its scripts."""
    installed = Path(sysconfig.get_path("purelib")).resolve()
    for file in package.files or []:
        path = Path(str(package.locate_file(file))).resolve()
        if path.is_relative_to(installed):
            parts = path.relative_to(installed).parts
            # a folder without __init__.py is shared with other distributions (google/)
            depth = 1 if (installed / parts[0] / "__init__.py").exists() else 2
            if parts[0].endswith((".dist-info", ".libs")) or len(parts) == 1:
                depth = 1
            link = packages.joinpath(*parts[:depth])
            link.parent.mkdir(exist_ok=True)
            if not link.exists():
                link.symlink_to(installed.joinpath(*parts[:depth]))
        elif path.parent.name == "bin" and path.exists() and not (scripts / path.name).exists():
            first, _, rest = path.read_bytes().partition(b"\n")
            if b"python" in first:
                _write_script(scripts / path.name, rest.decode())
            else:
                (scripts / path.name).symlink_to(path)


def _write_script(path: Path, text: str) -> None:
    path.write_text(f"#!{path.parent / 'python'}\n{text}")
    path.chmod(0o755)


def is_importable(scripts: Path, module: str) -> bool:
    """Whether the environment has a module."""
    code = f"import importlib.util as u; print(u.find_spec({module!r}) is not None)"
    command = [str(scripts / "python"), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"
