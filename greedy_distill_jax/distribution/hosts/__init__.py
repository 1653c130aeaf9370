"""The processes of a job on many hosts: what started them, how they join, and whether they are alike."""
