"""What is kept on disk: checkpoints and record shards."""
