"""The commands of `yuan-grpc`, one module each."""
