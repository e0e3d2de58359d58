"""A compile run: what was asked, its rounds in turn, which is returned, and its directory."""
