"""The interpreter of a session: runs one cell after another in one namespace and tells the agent how each ended.

The agent starts it with this text on descriptor 4 and its own end of a socket pair on descriptor 3. A cell comes as a length, three descriptors beside it
and JSON; the descriptors become 0, 1 and 2 while it runs, so whatever prints, subprocesses too, prints to the cell and never to the socket. Standard
library only, Python 3.7 or newer; IPython does the work where it is installed.
"""

import array
import ast
import base64
import builtins
import inspect
import io
import json
import linecache
import os
import signal
import socket
import struct
import sys
import threading
import traceback
import warnings

CONTROL = 3
DISPLAY, RESULT = 1, 2
RESULTS = 100
FORMS = 32
RESULT_BYTES = 4 << 20
TEXT_CHARACTERS = 100000
CELLS_REMEMBERED = 200
INTERRUPTED = 130
# What an object may say of itself, in the order in which a client should prefer it.
METHODS = (
    ("text/html", "_repr_html_"),
    ("text/markdown", "_repr_markdown_"),
    ("image/svg+xml", "_repr_svg_"),
    ("image/png", "_repr_png_"),
    ("image/jpeg", "_repr_jpeg_"),
    ("text/latex", "_repr_latex_"),
    ("application/json", "_repr_json_"),
    ("application/javascript", "_repr_javascript_"),
)


class Results:
    """What the running cell displayed, packed as the host reads it, and whether some of it did not fit."""

    def __init__(self):
        self.clear()

    def clear(self):
        self.rows, self.size, self.truncated = [], 0, False

    def add(self, kind, data):
        """Keep {type: text, bytes or what JSON can say}; a form that does not fit is left out, and its size noted."""
        if len(self.rows) >= RESULTS:
            self.truncated = True
            return
        forms = []
        for name, value in list(data.items())[:FORMS]:
            name = str(name).encode("ascii", "replace")[:200]
            if isinstance(value, (bytes, bytearray)):
                value = base64.b64encode(value)
            elif isinstance(value, str):
                value = value.encode("utf-8", "backslashreplace")
            else:
                value = json.dumps(value, default=str).encode()
            follows = self.size + len(value) <= RESULT_BYTES
            forms.append(struct.pack("!HIB", len(name), len(value), follows) + name + (value if follows else b""))
            if follows:
                self.size += len(value)
            else:
                self.truncated = True
        self.rows.append(struct.pack("!BB", kind, len(forms)) + b"".join(forms))

    def packed(self):
        return b"".join(self.rows)


results = Results()


def plain_text(value):
    text = repr(value)
    return text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS] + "..."


def bundle(value):
    """{type: text, bytes or JSON}: every form that the object offers. One that fails is as good as none."""
    data = {"text/plain": plain_text(value)}
    if inspect.isclass(value):
        return data
    try:
        made = getattr(value, "_repr_mimebundle_", None)
        made = made() if callable(made) else None
        if isinstance(made, tuple):
            made = made[0]
        if isinstance(made, dict):
            data.update(made)
    except Exception:
        pass
    for name, method in METHODS:
        if name in data:
            continue
        try:
            made = getattr(value, method, None)
            made = made() if callable(made) else None
            if isinstance(made, tuple):
                made = made[0]
            if made is not None:
                data[name] = made
        except Exception:
            pass
    if "image/png" not in data and type(value).__module__.startswith("matplotlib.") and hasattr(value, "savefig"):
        data["image/png"] = drawn(value)
    return data


def drawn(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def show_figures():
    """Every open figure of matplotlib becomes a result: there is no window that it could open."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None or not hasattr(pyplot, "get_fignums"):
        return
    try:
        for number in pyplot.get_fignums():
            figure = pyplot.figure(number)
            results.add(DISPLAY, {"text/plain": plain_text(figure), "image/png": drawn(figure)})
    finally:
        pyplot.close("all")


class Interrupts:
    """SIGINT is for the cell: between cells it does nothing, so that one that comes late hits nobody."""

    inside = False

    def handle(self, number, frame):
        if self.inside:
            raise KeyboardInterrupt


interrupts = Interrupts()


class PlainShell:
    """Cells as the interactive interpreter runs them: the value of a last expression is shown."""

    def __init__(self):
        self.module = sys.modules["__main__"]
        self.namespace = self.module.__dict__
        for name in list(self.namespace):
            if not name.startswith("__"):
                del self.namespace[name]
        self.number = 0
        self.loop = None
        builtins.display = self.display

    def display(self, *values):
        """Show objects in every form that they offer."""
        for value in values:
            data = bundle(value)
            results.add(DISPLAY, data)
            print(data["text/plain"])

    def run(self, code):
        """The cell's exit code: 0, 1 after an exception, what SystemExit says, 130 after an interrupt."""
        self.number += 1
        name = "<cell {}>".format(self.number)
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        linecache.cache.pop("<cell {}>".format(self.number - CELLS_REMEMBERED), None)
        try:
            try:
                interrupts.inside = True
                try:
                    self.execute(code, name)
                finally:
                    show_figures()
                return 0
            finally:
                interrupts.inside = False
        except SystemExit as error:
            return exit_code(error)
        except KeyboardInterrupt as error:
            self.explain(error, name)
            return INTERRUPTED
        except BaseException as error:
            self.explain(error, name)
            return 1

    def execute(self, code, name):
        tree = ast.parse(code, name, "exec")
        shown = None
        if tree.body and isinstance(tree.body[-1], ast.Expr) and not code.rstrip().endswith(";"):
            shown = ast.Expression(tree.body.pop().value)
        self.evaluate(compile(tree, name, "exec", FLAGS, dont_inherit=True))
        if shown is None:
            return
        value = self.evaluate(compile(shown, name, "eval", FLAGS, dont_inherit=True))
        if value is not None:
            self.namespace["_"] = value
            data = bundle(value)
            results.add(RESULT, data)
            print(data["text/plain"])

    def evaluate(self, compiled):
        value = eval(compiled, self.namespace)
        if compiled.co_flags & inspect.CO_COROUTINE:
            import asyncio

            if self.loop is None or self.loop.is_closed():
                self.loop = asyncio.new_event_loop()
                asyncio.set_event_loop(self.loop)
            return self.loop.run_until_complete(value)
        return value

    def explain(self, error, name):
        """The traceback from the cell on: the kernel's own lines say nothing to whoever wrote it."""
        place = error.__traceback__
        while place is not None and place.tb_frame.f_code.co_filename != name:
            place = place.tb_next
        try:
            traceback.print_exception(type(error), error, place)
        except BaseException:
            print(type(error).__name__, file=sys.stderr)


FLAGS = getattr(ast, "PyCF_ALLOW_TOP_LEVEL_AWAIT", 0)


def exit_code(error):
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def ipython_shell():
    """A shell of IPython's that shows objects as results. Raises ImportError where there is none."""
    from IPython.core.displayhook import DisplayHook
    from IPython.core.displaypub import DisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Shown(DisplayHook):
        def write_output_prompt(self):
            pass

        def write_format_data(self, format_dict, md_dict=None):
            results.add(RESULT, format_dict)
            print(format_dict.get("text/plain", ""))

        def finish_displayhook(self):
            sys.stdout.flush()

    class Published(DisplayPublisher):
        def publish(self, data, metadata=None, **rest):
            results.add(DISPLAY, data)
            print(data.get("text/plain", ""))

    config = Config()
    # History would be a database in the home directory, which every cell changes.
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "NoColor"
    for folder in ("/dev/shm", "/tmp"):
        if os.access(folder, os.W_OK):
            config.InteractiveShell.ipython_dir = "{}/.ipython-{}".format(folder, os.getuid())
            break

    warnings.filterwarnings("ignore", message="To exit: use")

    class Shell(InteractiveShell):
        # Not through a terminal, which would put a CR before every LF.
        system = InteractiveShell.system_raw
        displayhook_class = Shown
        display_pub_class = Published

        def _showtraceback(self, etype, evalue, stb):
            if etype is not SystemExit:
                print(self.InteractiveTB.stb2text(stb), file=sys.stderr)

        def run(self, code):
            try:
                try:
                    interrupts.inside = True
                    outcome = self.run_cell(code, store_history=True)
                    show_figures()
                finally:
                    interrupts.inside = False
            except KeyboardInterrupt:
                return INTERRUPTED
            error = outcome.error_before_exec or outcome.error_in_exec
            if isinstance(error, SystemExit):
                return exit_code(error)
            if isinstance(error, KeyboardInterrupt):
                return INTERRUPTED
            return 0 if error is None else 1

        def ask_exit(self):
            raise SystemExit

    return Shell.instance(config=config, user_module=sys.modules["__main__"])


class Kernel:
    """Takes cells from the socket until it is closed."""

    def __init__(self):
        self.control = socket.socket(fileno=CONTROL)
        self.control.setblocking(True)
        self.control.set_inheritable(False)
        self.pid = os.getpid()
        self.null = os.open(os.devnull, os.O_RDWR)
        self.put([self.null, self.null, self.null])
        sys.argv = [""]
        os.environ.setdefault("MPLBACKEND", "Agg")
        warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
        warnings.filterwarnings("ignore", message="Matplotlib is currently using agg")
        if hasattr(os, "register_at_fork"):
            # A child has no business on the socket: it ends with the cell that made it.
            os.register_at_fork(after_in_child=self.control.close)
        self.shell = None
        if os.environ.get("INN_PYTHON") != "plain":
            try:
                self.shell = ipython_shell()
            except ImportError:
                pass
        if self.shell is None:
            self.shell = PlainShell()

    def put(self, descriptors):
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)

    def streams(self):
        """Fresh ones where the last cell closed them; the input always, because what it had read ahead is another cell's."""
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)
        for number, name in ((1, "stdout"), (2, "stderr")):
            if getattr(getattr(sys, name, None), "closed", True):
                self.stream(number, name)

    def stream(self, number, name):
        made = open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
        setattr(sys, name, made)
        setattr(sys, "__{}__".format(name), made)

    def serve(self):
        self.stream(1, "stdout")
        self.stream(2, "stderr")
        while True:
            cell, descriptors = self.receive()
            self.put(descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            self.streams()
            results.clear()
            signal.signal(signal.SIGINT, interrupts.handle)
            before = os.times()
            code = self.shell.run(cell["code"])
            self.flush()
            if os.getpid() != self.pid:
                os._exit(code)
            after = os.times()
            # Children count once they were waited for; the last field is the wall clock.
            spent = sum(after[:4]) - sum(before[:4])
            self.put([self.null, self.null, self.null])
            self.send(
                {
                    "id": cell["id"],
                    "exit_code": code,
                    "cpu_us": max(0, int(spent * 1000000)),
                    "threads": threading.active_count() - 1,
                    "results_truncated": results.truncated,
                },
                results.packed(),
            )

    def flush(self):
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            try:
                stream.flush()
            except (AttributeError, OSError, ValueError):
                pass

    def receive(self):
        header, descriptors = b"", array.array("i")
        while len(header) < 4:
            space = socket.CMSG_SPACE(3 * descriptors.itemsize)
            data, beside, _, _ = self.control.recvmsg(4 - len(header), space)
            if not data:
                os._exit(0)
            header += data
            for level, kind, payload in beside:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
        (left,) = struct.unpack("!I", header)
        pieces = []
        while left:
            data = self.control.recv(min(left, 65536))
            if not data:
                os._exit(0)
            pieces.append(data)
            left -= len(data)
        return json.loads(b"".join(pieces).decode()), list(descriptors)

    def send(self, body, shown):
        head = json.dumps(body).encode()
        self.control.sendall(struct.pack("!II", len(head), len(shown)) + head + shown)


signal.signal(signal.SIGINT, interrupts.handle)
Kernel().serve()
