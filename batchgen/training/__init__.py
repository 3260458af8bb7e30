"""How the embedded model was made. Nothing else in batchgen needs it; torch is imported by its functions."""
