"""The gRPC API: servicer, interceptor and standard services."""
