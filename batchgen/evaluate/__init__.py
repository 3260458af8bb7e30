"""Benchmarks as jobs: questions to prompts, the ordinary batch job, scores, and a table that compares two checkpoints."""
