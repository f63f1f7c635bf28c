"""Using a model: latent cache, sampling, generation."""
