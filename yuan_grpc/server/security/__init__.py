"""Access to the ports: certificates, tokens and the identity of callers."""
