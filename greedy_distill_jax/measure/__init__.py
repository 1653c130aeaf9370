"""How figures are taken: one clock and one median, memory of a program, one record of the environment."""
