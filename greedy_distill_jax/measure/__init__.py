"""One clock, one median, memory of a program, and the record that benchmarks write."""
