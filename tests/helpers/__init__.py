"""Cases and small programs that several tests share."""
