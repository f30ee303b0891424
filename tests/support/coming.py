"""Options, commands and folders that `deploy/` uses and that other changes bring. Each leaves with its change."""

OPTIONS = {
    "--allow-plaintext",
    "--frontends",
    "--log-format",
    "--metrics-port",
    "--tls-cert-file",
    "--tls-client-ca-file",
    "--tls-key-file",
    "--token-file",
    "--unix-socket",
    "--withdraw-seconds",
}

COMMANDS = {"probe"}

FOLDERS = {"../grafana", "../prometheus"}
