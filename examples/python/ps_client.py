"""A client of docs/http-api.md with Python's standard library: join, heartbeats, push-pull, leave."""

import http.client, json, os, secrets, sys, threading, time

PATIENCE_S = 60  # How long to look for a server that does not answer.
ROUND_S = 3600  # How long a synchronous round may take.


class Refused(Exception):
    """The servers do not take a request; repeating it would not help."""


class Connection:
    """Repeats requests until they are answered: a push is applied once all the same."""

    def __init__(self, address):
        self.connection = http.client.HTTPConnection(address, timeout=ROUND_S)
        token = os.environ.get("PS_TOKEN")
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
            except (OSError, http.client.HTTPException):
                # The next request connects anew. An idle connection is closed after some seconds.
                self.connection.close()
                if time.monotonic() > give_up:
                    raise
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
        `applied`, `dropped-late`, `refused-norm`, or `rejoined` for a worker that was taken for dead."""
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
