"""Flow matching: path, noise levels, solvers, guidance and the denoising loop; fp32, independent of any network."""
