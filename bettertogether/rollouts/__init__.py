"""Programs run over examples, and judged."""
