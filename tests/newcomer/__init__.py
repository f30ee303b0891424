"""A program that plays the mistakes of newcomers."""
