"""The only code that calls a model: loading, identity, tokens, forward passes, bridges, generation. Nothing is read from or written to the residual stream here but its recording."""
