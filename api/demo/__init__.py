"""`mergeopt demo`: the main job on real input, from training the experts to the exported winner."""

from api.demo.run import run

__all__ = ["run"]
