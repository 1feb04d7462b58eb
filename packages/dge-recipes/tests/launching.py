"""How tests start several processes."""

from dge_recipes.config import launcher_path

__all__ = ["launch"]


def launch(launcher: str, count: int) -> list[str]:
    """Arguments of ``python`` that start `count` processes of the module named after them."""
    if launcher == "torchrun":
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]  # any free port
        return ["-m", "torch.distributed.run", "--nproc_per_node", str(count), *meeting, "-m"]
    config = str(launcher_path("cpu"))
    return ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(count), "-m"]
