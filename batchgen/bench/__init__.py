"""The benchmark beside other systems: one server, one set of rows, every way of running them in a process of its own."""
