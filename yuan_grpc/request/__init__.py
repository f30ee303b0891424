"""The fields of `GenerateRequest`, as the client, the command line and the server share them."""
