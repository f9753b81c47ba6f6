"""Forward passes: a model's blocks, what is kept of a pass, the residual stream and its reading, generation."""
