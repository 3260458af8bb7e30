"""Weights from a store or a hub to the node's own disk, once per node."""
