"""Devices and what lies where: mesh, sharding table, stripes of frames."""
