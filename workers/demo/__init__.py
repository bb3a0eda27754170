"""The demo's real inputs: word-level tasks from PyPI packages and experts fine-tuned on them."""
