"""Models that draw images, video, music, shapes and molecules: diffusion, consistency, bridges and autoregression."""
