"""The commands of `mergeopt`, grouped by what they talk to."""
