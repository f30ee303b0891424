"""A program that breaks servers, and accounts for each call."""
