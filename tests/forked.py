"""A `python` that has imported torch already, for tests of whole scripts.

in   a socket, and what python is given: a script, `-` or `-c CODE`, and words
out  what python would print, and its exit status
run  python tests/forked.py SOCKET             # the server, until its stdin ends
     python tests/forked.py SOCKET merge.py -h # the same as `python merge.py -h`

A script starts a dozen commands, and each takes two to five seconds to import torch. Here one
server imports it, and every command is a fork of the server: a process with its own files, memory
and end. What Python reads when it starts (PYTHONHASHSEED) is the server's. What it does last
(atexit) is left out: to take torch down again lasts half a second.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import sys


def serve(at):
    """Fork for every command, until stdin ends. Only a fork that has one to run returns, with
    (words, folder, environment) and its own stdin, stdout and stderr.
    """
    # What takes so long.
    import torch  # noqa: F401

    with contextlib.suppress(ImportError):
        import triton  # noqa: F401

    door = socket.socket(socket.AF_UNIX)
    door.bind(at)
    door.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no one waits for these forks
    while True:
        if sys.stdin in select.select([door, sys.stdin], [], [])[0]:
            sys.exit()  # who started it is gone
        asked, _ = door.accept()
        if os.fork() == 0:
            break
        asked.close()
    door.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    # The first fork waits for a second one, which runs the command, and sends its status. Where
    # no one waits any more, the command is killed.
    size, files, _, _ = socket.recv_fds(asked, 4, 3)
    given = json.loads(asked.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    command = os.fork()
    if command:
        ended, status = 0, 0
        while not ended:
            if select.select([asked], [], [], 0.02)[0]:
                os.kill(command, signal.SIGKILL)
                os._exit(1)
            ended, status = os.waitpid(command, os.WNOHANG)
        status = os.waitstatus_to_exitcode(status)
        asked.sendall(bytes([status if status >= 0 else 128 - status]))
        os._exit(0)
    asked.close()
    for own, file in enumerate(files):
        os.dup2(file, own)
        os.close(file)
    return given


def run(words, folder, environment):
    """What python does with these words."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = {"-": sys.stdin.read, "-c": lambda: words.pop(1)}.get(words[0])
    sys.path[0] = "" if code else os.path.dirname(os.path.abspath(words[0]))
    program = code and compile(code(), "<string>", "exec")
    sys.argv = words
    status = 0
    try:
        if program:
            exec(program, {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    sys.stdout.flush()
    os._exit(status or 0)


def ask(at, words):
    """The exit status of a command that the server has run; of a signal 128 + n, as in a shell."""
    given = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
    with socket.socket(socket.AF_UNIX) as door:
        door.connect(at)
        socket.send_fds(door, [len(given).to_bytes(4, "big")], [0, 1, 2])
        door.sendall(given)
        status = door.recv(1)
    return status[0] if status else 1


if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    run(*serve(sys.argv[1]))
