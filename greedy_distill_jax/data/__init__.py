"""Sources of captioned videos, text encoding, video files and the loader."""
