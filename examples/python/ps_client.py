"""A client of docs/http-api.md with Python's standard library: join, heartbeats, push-pull, leave."""

import http.client, json, os, secrets, sys, threading, time
import mmap, operator

PATIENCE_S = 60  # How long to look for a server that does not answer.
ROUND_S = 3600  # How long a synchronous round may take.


class Refused(Exception):
    """The servers do not take a request; repeating it would not help."""


class Unreachable(ConnectionError):
    """No server answers at the address; it may do so later."""


class InvalidInput(ValueError):
    """The caller passed what the servers cannot use. Nothing was sent."""


class WrongKind(InvalidInput, TypeError):
    """An object of another kind: a tensor, a NumPy array, text, a list."""


class WrongDtype(InvalidInput):
    """Numbers that are not 32-bit floats, or whose bytes are in another order."""


class NotContiguous(InvalidInput):
    """Numbers that do not lie one after the other, in row-major order."""


class WrongSize(InvalidInput):
    """Another number of numbers than the servers have weights."""


def float32_bytes(numbers, count, what="gradient"):
    """Returns a view of the bytes of `count` 32-bit floats: raw bytes, or a buffer that says that it holds these."""
    kind = type(numbers).__name__
    try:
        view = memoryview(numbers)
    except (TypeError, ValueError, BufferError) as error:
        raise WrongKind(f"the {what} is a {kind}, not bytes: pass bytes, or a NumPy array of float32; of a PyTorch "
                        "tensor that is `tensor.detach().cpu().numpy()`") from error
    # Bytes as such do not say what is in them.
    is_raw = isinstance(view.obj, (bytes, bytearray, mmap.mmap)) and view.format in "Bbc"
    if not is_raw and view.format.lstrip("@=<") != "f":
        raise WrongDtype(f"the {what} has numbers of the format '{view.format}', not little-endian 32-bit floats "
                         "('<f'): with NumPy, convert it with `.astype('<f4')`")
    if not view.c_contiguous:
        order = "in Fortran's order (column-major)" if view.f_contiguous else "not contiguous"
        raise NotContiguous(f"the {what} is {order}: with NumPy, pass `numpy.ascontiguousarray(..)` of it")
    if view.nbytes != 4 * count:
        raise WrongSize(f"the {what} has {view.nbytes} bytes, expected {4 * count}: {count} numbers of 4 bytes")
    return view


def _number(loss):
    if not isinstance(loss, (str, bytes, bytearray)):
        try:
            return float(loss)
        except (TypeError, ValueError, RuntimeError):  # PyTorch's is the last.
            pass
    raise WrongKind(f"the loss is a {type(loss).__name__}: pass one number; of a PyTorch tensor that is `loss.item()`")


def _count(num_examples):
    try:
        count = operator.index(num_examples)
    except TypeError:
        raise WrongKind(f"the number of examples is {num_examples!r}: pass a whole number") from None
    if not 0 <= count < 2**32:
        raise InvalidInput(f"the number of examples is {count}: it is at least 0 and below 2**32")
    return count


class Connection:
    """Repeats requests until they are answered: a push is applied once all the same."""

    def __init__(self, address):
        try:
            self.connection = http.client.HTTPConnection(address, timeout=ROUND_S)
            is_address = "/" not in address
        except http.client.InvalidURL:
            is_address = False
        if not is_address:
            raise InvalidInput(f"the address {address!r} is not HOST:PORT, such as 127.0.0.1:8265")
        token = os.environ.get("PS_TOKEN", "")
        if not (token.isascii() and token.isprintable()):
            raise InvalidInput("PS_TOKEN has characters other than printable ASCII: set it to the servers' token")
        self.token = {"authorization": f"Bearer {token}"} if token else {}

    def call(self, method, path, headers={}, body=b""):
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.connection.request(method, path, body, self.token | headers)
                reply = self.connection.getresponse()
                reply.body = reply.read()
                if reply.status not in (429, 503) or time.monotonic() > give_up:
                    return reply
            except (OSError, http.client.HTTPException) as error:
                # The next request connects anew. An idle connection is closed after some seconds.
                self.connection.close()
                if time.monotonic() > give_up:
                    where = f"{self.connection.host}:{self.connection.port}"
                    raise Unreachable(f"{where} did not answer for {PATIENCE_S} s: {error or repr(error)}") from error
            time.sleep(0.1)

    def ok(self, *request):
        reply = self.call(*request)
        if reply.status != 200:
            raise Refused(f"the servers say {reply.status}: {reply.body.decode().strip()}")
        return reply


class Worker:
    """A member of a training: `weights` (bytes, f32) are the latest it got, `clock` its next step.

    Says every `heartbeat` seconds that it is alive, so that a step may take longer than the lease.
    """

    def __init__(self, address, rank, heartbeat=1.0):
        assert sys.byteorder == "little", "the numbers on the wire are little-endian"
        self.rank, self.address, self.servers = rank, address, Connection(address)
        self.join()
        self.has_left = threading.Event()
        threading.Thread(target=self._beat, args=(heartbeat,), daemon=True).start()

    def join(self):
        """Begins a new life of the worker."""
        rank = {"ps-worker": str(self.rank)}
        while True:
            # Repeated with the same number if the answer is lost.
            reply = self.servers.call("POST", "/v1/join", rank | {"ps-request": str(secrets.randbits(64))})
            if "ps-join-again" not in reply.headers:  # Else the answer came too late: the lease was over.
                break
        if reply.status != 200:
            raise Refused(f"the servers say {reply.status}: {reply.body.decode().strip()}")
        self.me = rank | {"ps-incarnation": reply.headers["ps-incarnation"]}
        self.clock = int(reply.headers["ps-clock"])
        self._keep(self.servers.ok("GET", "/v1/weights"))

    def _keep(self, reply):
        self.weights, self.version = reply.body, int(reply.headers["ps-version"])

    def _beat(self, every):
        servers = Connection(self.address)  # The other connection may be waiting for a round.
        while not self.has_left.wait(every):
            try:
                servers.call("POST", "/v1/heartbeat", self.me)  # If it is refused, so is the next push.
            except OSError:
                pass  # The next push meets the same error, and says so.

    def layout(self):
        return json.loads(self.servers.ok("GET", "/v1/layout").body)

    def push_pull(self, gradient, loss, num_examples):
        """Pushes a gradient (bytes, f32) of `weights`, gets the next ones, and returns what became of it:
        `applied`, `dropped-late`, `refused-norm`, or `rejoined` for a worker that was taken for dead.
        `InvalidInput` says what is wrong with an argument; nothing was pushed then."""
        gradient = float32_bytes(gradient, len(self.weights) // 4)
        loss, num_examples = _number(loss), _count(num_examples)
        stamp = {"ps-clock": str(self.clock), "ps-version": str(self.version),
                 "ps-loss": str(loss), "ps-num-examples": str(num_examples)}
        reply = self.servers.call("POST", "/v1/push-pull", self.me | stamp, gradient)
        if "ps-join-again" in reply.headers:
            self.join()
            return "rejoined"
        if reply.status != 200:
            raise Refused(f"the servers say {reply.status}: {reply.body.decode().strip()}")
        self._keep(reply)
        self.clock += 1
        return reply.headers["ps-outcome"]

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.has_left.set()
        if error is None:
            self.servers.ok("POST", "/v1/leave", self.me)
