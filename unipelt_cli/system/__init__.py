"""This machine: devices, memory, processes, threads, network and imports."""
