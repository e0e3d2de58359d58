"""The steps of a strategy that are ours: the prompt step and the weight step."""
