"""The loader that lies beside an export: a script that needs neither this project nor timm."""

from importlib.resources import files
from string import Template

__all__ = ["loader_script"]

_TEMPLATE = "classify.template"
_RUNTIMES = {
    "onnx": (
        "onnxruntime",
        "import onnxruntime",
        'SESSION = onnxruntime.InferenceSession(str(HERE / META["file"]), providers=["CPUExecutionProvider"])\n\n\n'
        'def run(pixels):\n    return SESSION.run(None, {META["inputs"][0]["name"]: pixels})[0]',
    ),
    "openvino": (
        "openvino",
        "import openvino",
        '# Some CPUs would compute in bfloat16 by default.\nOPTIONS = {"INFERENCE_PRECISION_HINT": "f32"}\n'
        'COMPILED = openvino.Core().compile_model(str(HERE / META["file"]), "CPU", OPTIONS)\n\n\n'
        "def run(pixels):\n    return COMPILED([pixels])[0]",
    ),
    "pt2": (
        "torch",
        "import torch",
        'PACKAGE = torch._inductor.aoti_load_package(str(HERE / META["file"]))\n\n\n'
        "def run(pixels):\n    with torch.no_grad():\n        return PACKAGE(torch.from_numpy(pixels)).numpy()",
    ),
}
_CLASS, _FEATURES = "best, *([] if NAMES is None else [NAMES[best]])", "*row.tolist()"


def loader_script(to: str, name: str, *, classifies: bool) -> str:
    """The script's text.

    Args:
        to: what was exported to.
        name: of the script's file, for its usage.
        classifies: print the likeliest class, else all outputs.
    """
    needs, imports, load = _RUNTIMES[to]
    template = (files("dge_recipes.export") / _TEMPLATE).read_text(encoding="utf-8")
    text = Template(template).substitute(
        script=name, needs=needs, imports=imports, load=load, printed=_CLASS if classifies else _FEATURES
    )
    return text if classifies else text.replace("            best = int(row.argmax())\n", "")
