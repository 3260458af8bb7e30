"""Gates: limits on what rows may look like, for the first rows of a run and for its whole output."""
