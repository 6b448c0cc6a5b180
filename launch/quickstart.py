"""The quickstart of the README: train, score, export and re-load a small real model (see `make quickstart`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metatt_scale.cli import run

if __name__ == "__main__":
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml"
    run(["quickstart", str(recipe), *sys.argv[1:]])
