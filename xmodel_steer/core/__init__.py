"""Nouns: errors, spaces, prompts, contrast sets, vectors, alignment. No model, file, network, figure or progress bar."""
