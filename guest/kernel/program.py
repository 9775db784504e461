"""The interpreter of a session: runs one cell after another in one namespace and tells the agent how each ended.

The agent starts it with this text on descriptor 4 and its own end of a socket pair on descriptor 3. A cell comes as a length, three descriptors beside it,
its id and its code; the descriptors become 0, 1 and 2 while it runs, so whatever prints, subprocesses too, prints to the cell and never to the socket.
Standard library only, Python 3.7 or newer; IPython where it is installed and a cell asks for it.

Whoever sent the first cell waits for what is imported here, and in a guest most modules of the library cost a millisecond or more. So these are, but for
linecache, the ones that are built in; what only some cells need comes with the first of them. So files in the user's directory that are called like a
module do not keep the interpreter from starting either.
"""

import _ast
import _signal
import _socket
import _struct
import _thread
import binascii
import builtins
import io
import linecache
import os
import sys

CONTROL = 3
DISPLAY, RESULT = 1, 2
RESULTS = 100
FORMS = 32
RESULT_BYTES = 4 << 20
TEXT_CHARACTERS = 100000
CELLS_REMEMBERED = 200
INTERRUPTED = 130
BEGUN = b"b"
CO_COROUTINE = 0x80
FLAGS = getattr(_ast, "PyCF_ALLOW_TOP_LEVEL_AWAIT", 0)
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
        # The value of the last expression: where that is a figure, it need not be shown once more.
        self.value = None

    def add(self, kind, data):
        """Keep {type: text, bytes or what JSON can say}; a form that does not fit is left out, and its size noted."""
        if len(self.rows) >= RESULTS:
            self.truncated = True
            return
        forms = []
        for name, value in list(data.items())[:FORMS]:
            name = str(name).encode("ascii", "replace")[:200]
            if isinstance(value, (bytes, bytearray)):
                value = binascii.b2a_base64(value, newline=False)
            elif isinstance(value, str):
                value = value.encode("utf-8", "backslashreplace")
            else:
                import json

                value = json.dumps(value, default=str).encode()
            follows = self.size + len(value) <= RESULT_BYTES
            forms.append(_struct.pack("!HIB", len(name), len(value), follows) + name + (value if follows else b""))
            if follows:
                self.size += len(value)
            else:
                self.truncated = True
        self.rows.append(_struct.pack("!BB", kind, len(forms)) + b"".join(forms))

    def packed(self):
        return b"".join(self.rows)


results = Results()


def plain_text(value):
    text = repr(value)
    return text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS] + "..."


def bundle(value):
    """{type: text, bytes or JSON}: every form that the object offers. One that fails is as good as none."""
    data = {"text/plain": plain_text(value)}
    if isinstance(value, type):
        return data
    try:
        made = getattr(value, "_repr_mimebundle_", None)
        made = made() if callable(made) else None
        if isinstance(made, tuple):
            made = made[0]
        if isinstance(made, dict):
            data.update(made)
    except Exception:
        # The object's own code: whatever it raises, the value has its other forms.
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
            # Likewise.
            pass
    try:
        if "image/png" not in data and isinstance(value, getattr(sys.modules.get("matplotlib.figure"), "Figure", ())):
            data["image/png"] = drawn(value)
    except Exception:
        # A figure that cannot be drawn raises what its library likes, and still has its text.
        pass
    return data


def drawn(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def show_figures(*_, **__):
    """Every open figure of matplotlib becomes a result: there is no window that it could open."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None or not hasattr(pyplot, "get_fignums"):
        return
    try:
        for number in pyplot.get_fignums():
            figure = pyplot.figure(number)
            if figure is not results.value:
                results.add(DISPLAY, {"text/plain": plain_text(figure), "image/png": drawn(figure)})
    finally:
        pyplot.close("all")


def with_pyplot(pyplot):
    # As in a notebook: figures come in the order of their show(), and what is drawn after it is another one.
    pyplot.show = show_figures
    import warnings

    warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
    warnings.filterwarnings("ignore", message="Matplotlib is currently using agg")


class Imports:
    """Looks on while modules are imported: before and after those that it is told of it does something."""

    def __init__(self):
        self.watched = {}

    def find_spec(self, name, path=None, target=None):
        if name not in self.watched:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader.exec_module = self.loading(name, spec.loader.exec_module)
                    return spec
        return None

    def loading(self, name, load):
        def exec_module(module):
            before, after = self.watched[name]
            undo = before() if before else None
            try:
                load(module)
            finally:
                if undo:
                    undo()
            after(module)
            # Not before: what was interrupted is tried again.
            self.watched.pop(name, None)

        return exec_module


class Interrupts:
    """SIGINT is for the cell: between cells it does nothing, lest one that comes late hit the next; one before the cell's first line waits for it."""

    taken = False
    inside = False
    early = False

    def handle(self, number, frame):
        if self.inside:
            raise KeyboardInterrupt
        self.early = self.taken

    def take(self):
        """A cell is there."""
        self.taken, self.early = True, False

    def enter(self):
        """Its code begins, here or in another shell."""
        self.inside = True
        if self.early:
            self.early = False
            raise KeyboardInterrupt

    def leave(self):
        """The cell is over."""
        self.taken = self.early = False


interrupts = Interrupts()


class NotPythonError(Exception):
    """A cell that does not compile: IPython may know what it means."""


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

    def run(self, code, more=None):
        """The cell's exit code: 0, 1 after an exception, what SystemExit says, 130 after an interrupt. What is no Python goes to `more`'s shell, if any."""
        self.number += 1
        name = "<cell {}>".format(self.number)
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        linecache.cache.pop("<cell {}>".format(self.number - CELLS_REMEMBERED), None)
        try:
            try:
                interrupts.enter()
                try:
                    self.execute(code, name, more)
                finally:
                    show_figures()
                return 0
            finally:
                interrupts.inside = False
        except NotPythonError:
            return more().run(code)
        except SystemExit as error:
            return exit_code(error)
        except KeyboardInterrupt as error:
            self.explain(error, name)
            return INTERRUPTED
        except BaseException as error:
            self.explain(error, name)
            return 1

    def execute(self, code, name, more):
        try:
            tree = compile(code, name, "exec", FLAGS | _ast.PyCF_ONLY_AST, dont_inherit=True)
        except SyntaxError:
            if more is None or more() is None:
                raise
            raise NotPythonError from None
        shown = None
        if tree.body and isinstance(tree.body[-1], _ast.Expr) and not code.rstrip().endswith(";"):
            shown = _ast.Expression(tree.body.pop().value)
        self.evaluate(compile(tree, name, "exec", FLAGS, dont_inherit=True))
        if shown is None:
            return
        value = self.evaluate(compile(shown, name, "eval", FLAGS, dont_inherit=True))
        if value is not None:
            self.namespace["_"] = results.value = value
            data = bundle(value)
            results.add(RESULT, data)
            print(data["text/plain"])

    def evaluate(self, compiled):
        value = eval(compiled, self.namespace)
        if compiled.co_flags & CO_COROUTINE:
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
            import traceback

            traceback.print_exception(type(error), error, place)
        except BaseException:
            print(type(error).__name__, file=sys.stderr)


def exit_code(error):
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


class IPython:
    """IPython, where it is installed, over the names of the plain shell.

    It takes half a second and 20 MB, so it comes with the first cell that needs it: one that is no Python, that asks for get_ipython(), or that imports
    it, were it through another module. From the next cell on everything is its own.
    """

    def __init__(self, plain, imports):
        self.plain = plain
        self.made = None
        self.tried = False
        imports.watched["IPython"] = (self.before, self.after)
        # Not among the builtins, where libraries look for it to find out where they are, pandas at every table.
        plain.namespace["get_ipython"] = self.asked_for

    def shell(self):
        """The shell; None where there is none."""
        if self.made is None and not self.tried:
            try:
                import IPython  # noqa: F401 - the rest happens beside the import
            except Exception:
                # Not there, or broken in a way of its own: cells do without it.
                self.tried = True
        return self.made

    def asked_for(self):
        """Shell that this is."""
        if self.shell() is None:
            raise NameError("name 'get_ipython' is not defined")
        return self.made

    def before(self):
        """Half of the time goes into completion and a terminal, which nobody has here: withheld, where IPython can do without."""
        import types

        def embed(*args, **more):
            from IPython.terminal.embed import embed

            return embed(*args, **more)

        stand_in = types.ModuleType("IPython.terminal.embed")
        stand_in.embed = embed
        withheld = {
            name: module for name, module in (("jedi", None), (stand_in.__name__, stand_in)) if name not in sys.modules
        }
        sys.modules.update(withheld)

        def undo():
            for name, module in withheld.items():
                if name in sys.modules and sys.modules[name] is module:
                    del sys.modules[name]

        return undo

    def after(self, module):
        try:
            self.made = ipython_shell(self.plain)
        except Exception:
            # Of a version, or in a state, that we cannot work with.
            self.tried = True


def ipython_shell(plain):
    from IPython.core.displayhook import DisplayHook
    from IPython.core.displaypub import DisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Shown(DisplayHook):
        def __call__(self, result=None):
            results.value = result
            super().__call__(result)

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

    class Shell(InteractiveShell):
        # Not through a terminal, which would put a CR before every LF.
        system = InteractiveShell.system_raw
        displayhook_class = Shown
        display_pub_class = Published

        def _showtraceback(self, etype, evalue, stb):
            if etype is not SystemExit:
                print(self.InteractiveTB.stb2text(stb).rstrip("\n"), file=sys.stderr)

        def run(self, code):
            try:
                try:
                    interrupts.enter()
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

    import warnings

    warnings.filterwarnings("ignore", message="To exit: use")
    shell = Shell.instance(config=config, user_module=plain.module)
    shell.display_formatter.formatters["image/png"].for_type_by_name("matplotlib.figure", "Figure", drawn)
    # Outputs are counted on; the cell that brought this about counts as one of the plain shell's.
    shell.execution_count = plain.number + 1
    return shell


class Kernel:
    """Takes cells from the socket until it is closed."""

    def __init__(self):
        self.control = _socket.socket(fileno=CONTROL)
        self.control.setblocking(True)
        os.set_inheritable(CONTROL, False)
        self.pid = os.getpid()
        self.null = os.open(os.devnull, os.O_RDWR)
        self.put([self.null, self.null, self.null])
        sys.argv = [""]
        os.environ.setdefault("MPLBACKEND", "Agg")
        if hasattr(os, "register_at_fork"):
            # A child has no business on the socket: it ends with the cell that made it.
            os.register_at_fork(after_in_child=self.control.close)
        imports = Imports()
        imports.watched["matplotlib.pyplot"] = (None, with_pyplot)
        sys.meta_path.insert(0, imports)
        self.plain = PlainShell()
        self.ipython = None if os.environ.get("INN_PYTHON") == "plain" else IPython(self.plain, imports)

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

    def run(self, code):
        if self.ipython is None:
            return self.plain.run(code)
        if self.ipython.made is None:
            return self.plain.run(code, self.ipython.shell)
        return self.ipython.made.run(code)

    def serve(self):
        self.stream(1, "stdout")
        self.stream(2, "stderr")
        while True:
            identity, code, descriptors = self.receive()
            self.put(descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            self.streams()
            results.clear()
            _signal.signal(_signal.SIGINT, interrupts.handle)
            interrupts.take()
            self.control.sendall(BEGUN)
            before = os.times()
            status = self.run(code)
            interrupts.leave()
            self.flush()
            if os.getpid() != self.pid:
                os._exit(status)
            after = os.times()
            # Children count once they were waited for; the last field is the wall clock.
            spent = max(0, int((sum(after[:4]) - sum(before[:4])) * 1000000))
            self.put([self.null, self.null, self.null])
            shown = results.packed()
            head = (len(identity), status, spent, min(_thread._count(), 1 << 30), results.truncated, len(shown))
            self.control.sendall(_struct.pack("!BBQIBI", *head) + identity + shown)

    def flush(self):
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            try:
                stream.flush()
            except (AttributeError, OSError, ValueError):
                pass

    def receive(self):
        """(id, code, descriptors) of the next cell, whose variables are set. Does not return when there is none any more."""
        header, rights = b"", b""
        while len(header) < 4:
            data, beside, _, _ = self.control.recvmsg(4 - len(header), _socket.CMSG_SPACE(12))
            if not data:
                os._exit(0)
            header += data
            for level, kind, payload in beside:
                if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                    rights += payload
        (left,) = _struct.unpack("!I", header)
        pieces = []
        while left:
            data = self.control.recv(min(left, 65536))
            if not data:
                os._exit(0)
            pieces.append(data)
            left -= len(data)
        body = b"".join(pieces)
        at = 1 + body[0]
        code = at + 4 + _struct.unpack_from("!I", body, at)[0]
        for variable in body[at + 4 : code].split(b"\0")[:-1]:
            name, _, value = variable.partition(b"=")
            os.environb[name] = value
        return body[1:at], body[code:].decode(), _struct.unpack("{}i".format(len(rights) // 4), rights)


_signal.signal(_signal.SIGINT, interrupts.handle)
Kernel().serve()
