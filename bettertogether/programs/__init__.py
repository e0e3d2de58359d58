"""Programs as values: copied, described, restored. What every other wing needs of a `dspy.Module`."""
