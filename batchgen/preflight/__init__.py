"""What a node and a checkpoint are like, and whether an engine can start there: refused in seconds."""
