"""Models of the losses that searches fit to what was told, and what they decide with them."""
