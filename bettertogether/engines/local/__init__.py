"""The engine that holds the model in this process."""
