"""Who may connect and call: certificates, tokens and the identity of callers."""
