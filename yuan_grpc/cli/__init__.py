"""What `yuan-grpc` can be told to do, a module for each command."""
