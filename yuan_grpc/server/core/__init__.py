"""Request processing that gRPC and HTTP share."""
