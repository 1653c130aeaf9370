"""Video autoencoders and the embedded linear codec."""
