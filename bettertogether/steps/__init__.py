"""The steps of a strategy that are ours: those that search prompts, and those that train weights."""
