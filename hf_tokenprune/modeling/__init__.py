"""Everything that travels to the Hub with a checkpoint: one flat folder that needs torch and transformers alone."""
