"""Generation: prompts as tokens, and the ways to let a model continue them."""
