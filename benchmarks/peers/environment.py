"""The environment of what this project is measured against: PyTorch, FBGEMM and TorchRec for CPUs, in `.venv-peers`.

    .venv/bin/python benchmarks/peers/environment.py

They need Python 3.11, and must not share an environment with JAX: each brings its own thread pools and its own pins.
"""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-peers"
# Versions whose binary interfaces fit each other.
TORCH, FBGEMM, TORCHREC = "torch==2.13.0", "fbgemm-gpu-cpu==1.8.0", "torchrec==1.8.0"
# What torchrec imports, besides torch and FBGEMM. Installed by hand, since torchrec itself asks for FBGEMM's GPU build,
# which would lie over the CPU one.
TORCHREC_NEEDS = ("tensordict", "torchmetrics", "tqdm", "iopath", "pyre-extensions", "psutil", "pyyaml")
CHECK = "import torch, fbgemm_gpu, torchrec"


def peers_python() -> Path:
    """Path of the environment's interpreter; makes the environment if it is absent or was left half made.

    Returns:
        The interpreter.

    Raises:
        RuntimeError: There is no Python 3.11 on this machine.
    """
    python = FOLDER / "bin" / "python"
    made = FOLDER / "made"
    if made.exists():
        return python
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run([_python_3_11(), "-m", "venv", str(FOLDER)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    # One after the other: with a CPU build of torch installed, none of the others brings the GPU build.
    for arguments in ([TORCH, "numpy<2.4"], TORCHREC_NEEDS, ["--no-deps", TORCHREC], ["--no-deps", FBGEMM]):
        subprocess.run([*pip, *arguments], check=True)
    subprocess.run([str(python), "-c", CHECK], check=True)
    made.write_text(f"{TORCH} {FBGEMM} {TORCHREC}\n")
    return python


def _python_3_11() -> str:
    for name in ("python3.11", *sorted(map(str, Path.home().glob(".pyenv/versions/3.11.*/bin/python")))):
        # pyenv puts a stand-in for each version on the path, which fails where another is selected.
        environment = {name: value for name, value in os.environ.items() if name != "PYENV_VERSION"}
        found = shutil.which(name)
        if found and subprocess.run([found, "-V"], capture_output=True, env=environment, cwd="/").returncode == 0:
            return found
    raise RuntimeError("FBGEMM 1.8.0 needs Python 3.11, and there is none on the path: install it, then run again")


if __name__ == "__main__":
    print(peers_python())
