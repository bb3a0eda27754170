"""Graders: from the text that a model wrote to a score. One file each, registered by a decorator."""
