"""Archives, pickles and images, read without trust."""
