"""Mathematics, tensors in and tensors out: moments, maps, fitters, controls, layer grids, statistics. No model and no file, but for the checkpoints of an autoencoder in training."""
