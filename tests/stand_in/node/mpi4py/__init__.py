"""A test double of mpi4py: as much as a trial of spawning asks of it."""
