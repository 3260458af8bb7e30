"""The sections of a job's spec, and reading one: `batchgen.spec.JobSpec` puts them together."""
