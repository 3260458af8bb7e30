"""Re-checks a finished output without a cluster: every row once, every file as its manifest says."""
