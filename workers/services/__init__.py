"""Asking services over the network: carefully, within limits, and never more than allowed."""
