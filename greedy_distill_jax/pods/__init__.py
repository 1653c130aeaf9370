"""Jobs for TPU slices that are not there: shapes, compilation, collectives, floating-point operations."""
