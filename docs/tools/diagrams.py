"""The diagrams of the documentation: `python docs/tools/diagrams.py` writes them to docs/pictures."""

from drawing import PICTURES, Drawing

BLUE, GREEN, SAND = "#e8effd", "#e7f6ec", "#fdf3e1"


def architecture() -> Drawing:
    """Return the picture of the whole: clients, the server's parts, the engine and the model."""
    picture = Drawing(
        900, 330, "Clients call the server over gRPC or HTTP; it drives vLLM's engine, which runs Yuan 2.0"
    )
    picture.box(235, 14, 645, 300, dashed=True)
    picture.text(557, 300, "yuan-grpc serve", size=12)
    for row, (name, detail) in enumerate(
        (
            ("Python, Go, Node …", "gRPC :50051"),
            ("curl, openai", "HTTP :8000, optional"),
            ("meshes, routers", "ORCA, vLLM's contract"),
        )
    ):
        y = 50 + 80 * row
        picture.labeled_box(20, y, 180, 56, name, detail)
        picture.arrow((200, y + 28), (262, y + 28))
    picture.labeled_box(
        265, 50, 130, 216, "Front end", "TLS, tokens", "health, reflection", "validation", "streams, batches", fill=BLUE
    )
    picture.labeled_box(
        435, 50, 130, 216, "Core", "admission", "fair turns", "deadlines, abort", "beam search", fill=BLUE
    )
    picture.labeled_box(605, 50, 110, 216, "vLLM", "scheduler", "KV cache", "batching", "constraints", fill=SAND)
    picture.labeled_box(
        755, 50, 110, 216, "Yuan 2.0", "tokenizer", "LFA and its state", "attention", "CPU or GPUs", fill=GREEN
    )
    for x in (395, 565, 715):
        picture.arrow((x, 158), (x + 38, 158))
    return picture


def request() -> Drawing:
    """Return the picture of the life of a request."""
    picture = Drawing(
        900, 250, "A request passes interceptor, validation, admission, plan and engine; its response streams back"
    )
    steps = (
        ("Interceptor", "id, identity", "log line"),
        ("Validate", "parse once", "all violations"),
        ("Admit", "limits, shares", "fair order"),
        ("Plan", "one request,", "best-of, beams"),
        ("Engine", "steps over", "all requests"),
    )
    picture.labeled_box(12, 92, 90, 70, "Client")
    for number, lines in enumerate(steps):
        x = 142 + 152 * number
        picture.labeled_box(x, 30, 118, 76, *lines, fill=BLUE if number < 4 else SAND)
        if number:
            picture.arrow((x - 34, 68), (x - 3, 68))
    picture.arrow((57, 92), (57, 68), (139, 68))
    picture.labeled_box(
        446, 156, 270, 64, "Response, stream writer", "whole characters; merged for slow readers", fill=BLUE
    )
    picture.arrow((809, 106), (809, 188), (720, 188))
    picture.arrow((446, 188), (57, 188), (57, 165))
    picture.text(250, 180, "deltas, then usage; or a status", size=12)
    picture.text(250, 212, "cancel, deadline, abort: removed before the next step", size=12)
    return picture


def lfa() -> Drawing:
    """Return the picture of localized filtering and its state."""
    picture = Drawing(
        860, 380, "Two causal convolutions of width two; the last y and the last h are the state of a sequence"
    )
    picture.box(40, 64, 190, 296, fill=SAND, dashed=True)
    picture.text(135, 92, "the state of a layer,", size=12)
    picture.text(135, 110, "in a block of the KV cache", size=12)
    columns = ((135, "t−1"), (360, "t"), (585, "t+1"))
    for x, name in columns:
        picture.text(x, 24, f"token {name}", bold=True)
        picture.labeled_box(x - 48, 278, 96, 44, f"y[{name}]", fill=GREEN)
        picture.labeled_box(x - 48, 184, 96, 44, f"h[{name}]", fill=BLUE)
        if name != "t−1":
            picture.labeled_box(x - 70, 86, 140, 44, f"LFA(y)[{name}]")
            picture.arrow((x, 278), (x, 231))
            picture.arrow((x, 184), (x, 133))
    for left, right in ((135, 360), (360, 585)):
        picture.arrow((left + 48, 290), (right - 40, 231))
        picture.arrow((left + 48, 196), (right - 56, 133))
    picture.text(668, 300, "input, hidden wide", size=12, anchor="start")
    picture.text(668, 216, "conv1: A₀y[t−1] + A₁y[t]", size=12, anchor="start")
    picture.text(668, 198, "half as wide", size=12, anchor="start")
    picture.text(668, 118, "norm(conv2 + y)", size=12, anchor="start")
    picture.text(668, 100, "to queries and keys", size=12, anchor="start")
    return picture


def processes() -> Drawing:
    """Return the picture of the processes of a server."""
    picture = Drawing(
        860, 330, "Front ends share the ports; a supervisor runs the engine core, whose workers have the GPUs"
    )
    picture.labeled_box(20, 130, 110, 60, "Clients")
    for row in range(3):
        y = 40 + 90 * row
        picture.labeled_box(220, y, 170, 64, f"Front end {row + 1}", "event loop, gRPC, HTTP", fill=BLUE)
        picture.arrow((130, 160), (217, y + 32))
        picture.arrow((390, y + 32), (487, 160))
    picture.labeled_box(490, 122, 150, 76, "Engine core", "scheduler", "KV cache", fill=SAND)
    for row in range(2):
        y = 80 + 92 * row
        picture.labeled_box(720, y, 120, 64, f"Worker {row + 1}", "model on a GPU", fill=GREEN)
        picture.arrow((640, 160), (717, y + 32))
    picture.labeled_box(490, 22, 150, 56, "Supervisor", "yuan-grpc serve")
    picture.arrow((565, 78), (565, 119), dashed=True)
    picture.arrow((490, 50), (393, 58), dashed=True)
    picture.labeled_box(490, 244, 150, 56, "Constraints", "compiles schemas", fill=BLUE)
    picture.arrow((390, 262), (487, 272))
    picture.text(174, 318, "one port, SO_REUSEPORT", size=12)
    picture.text(650, 54, "starts, replaces, ends", size=12, anchor="start")
    return picture


def all_diagrams() -> dict[str, str]:
    """Return the file names and texts of the diagrams."""
    drawings = {"architecture": architecture(), "request": request(), "lfa": lfa(), "processes": processes()}
    return {f"{name}.svg": drawing.svg() for name, drawing in drawings.items()}


if __name__ == "__main__":
    for name, svg in all_diagrams().items():
        (PICTURES / name).write_text(svg, "utf-8")
