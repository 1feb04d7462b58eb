"""Every job of the project; ``./ci/nox -l`` lists them, ``./ci/nox`` runs the default ones."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "typing", "kernels", "models", "recipes", "wheels", "demo"]

ROOT = Path(__file__).parent
PACKAGES = ROOT / "packages"
CONSTRAINTS = ROOT / "ci" / "constraints.txt"
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "numpy")


def install(session: nox.Session, *requirements: str) -> None:
    """Install with the project's pins, for the requirements and for what they build with."""
    session.install("-c", str(CONSTRAINTS), "--build-constraints", str(CONSTRAINTS), *requirements)


def kernels_wheel(session: nox.Session) -> str:
    """The dge-kernels wheel of these sources, built once and shared by the sessions."""
    package = PACKAGES / "dge-kernels"
    digest = hashlib.sha256(f"{sys.version_info[:2]} {shutil.which('nvcc')} {os.environ.get('DGE_CUDA')}".encode())
    kept = {".py", ".toml", ".txt", ".cmake", ".cpp", ".h", ".cu", ".cuh", ".md", ".typed"}
    for path in [CONSTRAINTS, ROOT / "VERSION", *sorted(package.glob("**/*"))]:
        if path.is_file() and (path.suffix in kept or path.name == "VERSION") and "build" not in path.parts:
            digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "wheels" / digest.hexdigest()[:16]
    if not list(folder.glob("*.whl")):
        session.log("building dge-kernels; a few minutes with nvcc, half a minute without")
        build(session, package, folder)
    return str(next(folder.glob("*.whl")))


def build(session: nox.Session, source: Path, output: Path, *options: str, env: dict[str, str] | None = None) -> None:
    """Build the sdist of `source`, and from that its wheel, with build isolation."""
    arguments = ["--quiet", "--build-constraints", str(CONSTRAINTS), "--out-dir", str(output), *options]
    session.run("uv", "build", *arguments, str(source), external=True, env=env or {})


def without(session: nox.Session, *modules: str) -> None:
    """Fail if a module that a package must do without is installed."""
    code = "import importlib.util as u, sys; sys.exit(', '.join(n for n in sys.argv[1:] if u.find_spec(n)))"
    session.run("python", "-c", code, *modules)


def pytest(session: nox.Session, package: str, *options: str) -> None:
    """Run a package's tests against what is installed, not against its sources."""
    folder = PACKAGES / package
    session.run("pytest", "-c", str(folder / "pyproject.toml"), "--rootdir", str(folder), *options, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style of the Python and C++ sources."""
    install(session, "ruff", "clang-format")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    sources = [str(path) for path in PACKAGES.glob("*/csrc/**/*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"}]
    session.run("clang-format", "--dry-run", "-Werror", *sources)


@nox.session
def typing(session: nox.Session) -> None:
    """mypy --strict over the three packages."""
    install(session, "mypy", "torch", "torchvision", "timm", "accelerate", "types-PyYAML", "pydantic", "tensorboard")
    session.run("mypy", *(str(path) for path in sorted(PACKAGES.glob("*/src/*"))))


@nox.session
def kernels(session: nox.Session) -> None:
    """dge-kernels with torch and nothing else."""
    install(session, *TEST_TOOLS, kernels_wheel(session))
    without(session, "timm", "torchvision", "accelerate")
    session.run("python", "-m", "dge_kernels.info")
    pytest(session, "dge-kernels")


@nox.session
def models(session: nox.Session) -> None:
    """dge-models with timm, without accelerate."""
    install(session, *TEST_TOOLS, kernels_wheel(session), str(PACKAGES / "dge-models"))
    without(session, "accelerate", "dge_recipes")
    pytest(session, "dge-models")


@nox.session
def recipes(session: nox.Session) -> None:
    """dge-recipes, with training and evaluation in one and in several processes."""
    local = (str(PACKAGES / "dge-models"), str(PACKAGES / "dge-recipes"))
    install(session, *TEST_TOOLS, kernels_wheel(session), *local)
    pytest(session, "dge-recipes")


@nox.session
def demo(session: nox.Session) -> None:
    """Train, evaluate and draw a dense and a dynamic model of handwritten digits into runs/demo."""
    local = (str(PACKAGES / "dge-models"), str(PACKAGES / "dge-recipes"))
    install(session, kernels_wheel(session), *local)
    options = session.posargs or ["--output", "runs/demo", "--overwrite"]
    session.run("python", "-m", "dge_recipes.demo", *options)


@nox.session
def gpu(session: nox.Session) -> None:
    """Everything that needs a GPU, with the torch of the machine; see ci/gpu."""
    session.run(str(ROOT / "ci" / "gpu"), *session.posargs, external=True)
