"""Whole jobs in virtual time: the production code of driver and workers over a store, a network, clocks and engines that
one seed makes fail. `python -m fault_sim --seeds 0:300`; see `world`."""
