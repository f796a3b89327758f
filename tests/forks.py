"""Connected processes, forked from one process with all imports done, so that they start fast."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.tasks import ENVIRONMENT

SERVER = """
import json, os, sys, traceback
import torch
torch.set_num_threads(1)
from lowrank_dp.__main__ import main
from lowrank_dp.evaluation import evaluate
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.setup import prepare
for model, task in (("tiny", "generated"), ("tiny-llama", "generated-table")):
    setup = prepare(TrainConfig(model=model, task=task, non_private=True, method="lora",
                                max_examples=60, batch_size=1), 0)
    evaluate(setup.model, setup.tokenizer, setup.task, max_examples=4)
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        found, status = os.waitpid(job["wait"], 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    if (child := os.fork()) == 0:
        for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
            file = os.open(f"{job['folder']}/{name}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, stream.fileno())
        os.environ.update(job["environment"])
        sys.argv = ["-c", *job["arguments"]]
        code = 1
        try:
            exec(job["script"], {"__name__": "__main__"})
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
"""
MAIN = "import sys\nfrom lowrank_dp.__main__ import main\nmain(sys.argv[1:])\n"


class Forks:
    """A process that has imported the package, and forks what :meth:`start` asks for."""

    def __enter__(self):
        self._scratch = tempfile.TemporaryDirectory()
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        return self

    def __exit__(self, *error):
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()
        self._scratch.cleanup()

    def ask(self, **job):
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def start(self, count, script, *arguments):
        """Start ``count`` connected processes that run a script, without the agent of torchrun."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        connected = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        return [
            Forked(self, script, arguments, connected | {"RANK": str(rank)})
            for rank in range(count)
        ]


class Forked:
    """A forked process, with the methods of ``subprocess.Popen`` that the tests use."""

    def __init__(self, forks, script, arguments, environment):
        self._forks, self._folder = forks, Path(tempfile.mkdtemp(dir=forks._scratch.name))
        self.pid = forks.ask(
            script=script,
            arguments=list(map(str, arguments)),
            environment=environment,
            folder=str(self._folder),
        )

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout):
        """Wait for the end, at most ``timeout`` seconds; return stdout and stderr."""
        end = time.monotonic() + timeout
        while not self._ended() and time.monotonic() < end:
            time.sleep(0.02)
        late = not self._ended()
        if late:
            self.send_signal(signal.SIGKILL)
        self.returncode = self._forks.ask(wait=self.pid)
        assert not late, f"still running after {timeout} s"
        return tuple((self._folder / name).read_text() for name in ("out", "err"))

    def _ended(self):
        """Whether the process is a zombie, which the server reaps on request."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
