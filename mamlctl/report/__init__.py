"""What a run tells in pictures."""
