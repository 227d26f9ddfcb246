"""Random lines and damaged recordings for a chat: whatever comes in, a line goes out, and the
chat goes on.

in   a model folder that hears, a recording
out  counts; exit status 1 if anything but one clear line came out
run  python tests/fuzz.py out/merged out/question.wav
     # about four minutes; --lines 200 --files 50 for a tenth

Half of the lines go to the screen's chat, half to --json. A recording is damaged by cutting it,
by turning bytes over, mostly in its header, and by saving it in other forms first. Nothing may
take longer than ten seconds, nor memory above a gigabyte.
"""

import argparse
import contextlib
import io
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import soundfile

sys.path.insert(0, str(Path(__file__).parent.parent))
import audio
import chat as module
from memory import peak

LETTERS = "abc xyz 0123 .,'\"\\/{}[]:<>|~ \t\x00\x04\x1b知ж🎧é\u200d\ud800\u2028"
PIECES = [
    "<|im_end|>", "<|im_start|>assistant\n", "<|speech|>", "a.wav", "~root/x.wav", "/etc", "..",
    "'", '"', ":rec x", '{"text": ', "null", "1e999", "\\ud800", "-0", "[" * 50,
]


def line(rng):
    return "".join(
        (
            rng.choice(PIECES)
            if rng.random() < 0.2
            else rng.choice(LETTERS) * rng.choice([1, 1, 1, 1, 200])
        )
        for _ in range(rng.randrange(1, 30))
    )


def request(rng):
    """A line for --json, more or less of its form."""
    if rng.random() < 0.3:
        return line(rng).encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "replace")
    values = [line(rng), 3, None, [], [line(rng)], {}, True, "hi"]
    return json.dumps(
        {
            name: rng.choice(values)
            for name in ("text", "audio", "system", "reset")
            if rng.random() < 0.5
        }
    ).encode()


def damaged(data, rng):
    """Bytes of a recording, some of them turned over or gone."""
    data = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 3, 20])):
        data[rng.randrange(min(len(data), rng.choice([12, 64, len(data)])))] = rng.randrange(256)
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def forms(recording):
    """The recording's bytes in some forms and rates."""
    samples, made = audio.load(recording), {}
    for form, subtype, rate in (
        ("WAV", "PCM_16", 16000),
        ("WAV", "FLOAT", 44100),
        ("FLAC", None, 22050),
        ("OGG", None, 16000),
        ("AIFF", None, 8000),
        ("MP3", None, 24000),
        ("AU", None, 16000),
        ("CAF", None, 48000),
    ):
        file = io.BytesIO()
        soundfile.write(file, samples, rate, format=form, subtype=subtype)
        made[form.lower() + str(rate)] = file.getvalue()
    return made


def asked(chat, parts_or_line):
    """(lines for people, seconds) of one turn: of a request to --json, or of a line or path on
    the screen.
    """
    out, err, began = io.StringIO(), io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if isinstance(parts_or_line, bytes):
            module.for_programs(chat, [parts_or_line], False)
        else:
            module.turn(chat, module.parts_of(parts_or_line))
    return out.getvalue(), err.getvalue(), time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description="Random lines and damaged recordings for a chat.")
    parser.add_argument("folder", help="a model folder that hears")
    parser.add_argument("recording", help="an audio file to damage")
    parser.add_argument("--lines", type=int, default=2000, help="random lines (default 2000)")
    parser.add_argument("--files", type=int, default=500, help="damaged recordings (default 500)")
    args = parser.parse_args()
    rng = random.Random(0)
    chat = module.Chat(args.folder)
    wrong = []
    answered = 0
    slowest = 0.0
    # What is written is not the question here.
    module.LIMIT = 8
    # Addresses, far more than memory. (macOS has no such limit.)
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    with tempfile.TemporaryDirectory() as folder:
        recordings = list(forms(args.recording).items())
        inputs = [request(rng) if n % 2 else line(rng) for n in range(args.lines)]
        for n in range(args.files):
            name, data = rng.choice(recordings)
            path = Path(folder) / f"{n}.{''.join(c for c in name if c.isalpha())}"
            path.write_bytes(damaged(data, rng))
            inputs.append(json.dumps({"audio": str(path)}).encode() if n % 2 else str(path))
        for given in inputs:
            # Whatever it is, it would have ended the chat.
            try:
                out, err, seconds = asked(chat, given)
            except BaseException as error:
                wrong.append((given, repr(error)))
                chat.begin("")
                continue
            slowest = max(slowest, seconds)
            answered += not (err or '"error"' in out)

            # A program gets one line of JSON, a person one line on what was wrong.
            program = isinstance(given, bytes)
            one = len((out if program else err).strip().split("\n")) == 1
            clear = one and (json.loads(out) if program else True)
            if seconds > 10 or "Traceback" in out + err or not clear:
                wrong.append((given, f"{seconds:.1f} s: {out[-200:]!r} {err[-200:]!r}"))
    memory = peak() / 1024  # GB
    for given, what in wrong[:20]:
        print(f"WRONG {str(given)[:150]!r}: {what}")
    print(
        f"{args.lines} lines and {args.files} recordings: {answered} answered, "
        f"{len(inputs) - answered - len(wrong)} refused, {len(wrong)} wrong; "
        f"the slowest took {slowest:.1f} s, memory {memory:.2f} GB at most"
    )
    sys.exit(bool(wrong) or memory > 1)


if __name__ == "__main__":
    main()
