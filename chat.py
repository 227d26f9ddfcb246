"""Talk to a merged model: spoken turns (audio files, or the microphone) and typed ones.

in   a model folder that hears; lines typed, paths of audio in them, or JSON lines
out  replies, streamed; with --json, a JSON line a turn
see  the spoken turn of vocab.py:
     <|im_start|>user\\n<|speech|> units <|/speech|><|im_end|>\\n<|im_start|>assistant\\n
run  python chat.py out/merged out/question.wav     # answers and exits
     python chat.py out/merged                      # asks for lines
"""

import argparse
import codecs
import json
import os
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch

import audio
from adapter import Listener
from listen import add_ears, hear, load, wants_words, written_down
from model import generate
from vocab import Said

LIMIT = 256  # tokens in a reply, and at most a quarter of the context
SLOWEST = 2  # units a second, at least: what is too long for the context is known unheard

# What looks like audio in a line; the latter get the ffmpeg command.
SOUND = audio.AUDIO | audio.UNREAD

# What shells write paths in: "a b.wav", 'a b.wav', a\ b.wav.
QUOTED = r"""(?<!\S)(?:"[^"]+"|'[^']+')(?!\S)"""
WORD = rf"{QUOTED}|(?:\\.|\S)+"
HELP = """a line is a typed turn; a path to audio in it is spoken (quote one with spaces)
clip.wav "its words" TEXT     for a model that wants words, if nobody else writes them down
:rec           speak; Enter ends it           :why     the conversation as tokens
:system TEXT   how it should behave           :reset   forget the conversation
:help          this                           :quit    or Ctrl-D: end. Ctrl-C stops a reply"""


class Chat:
    """A conversation with the model of a folder.

    messages   what was said, spoken turns as their units
    took       how long the last reply was in coming
    forgotten  how many pairs of turns had to go for the last one
    cut        did the last reply go on, beyond `limit` tokens?
    """

    def __init__(
        self, folder, device="cpu", hubert=None, temperature=0.0, transcriber=None, limit=None
    ):
        self.model, self.vocab, self.ears = load(folder, device, hubert, None, transcriber)
        self.vocab.template()  # a ValueError now rather than at the first turn
        self.folder = folder
        self.temperature = temperature
        self.messages = []
        self.took = {}
        self.forgotten = 0
        self.cut = False
        self.draw = random.SystemRandom()  # at a temperature no two replies are alike
        context = self.model.config.max_position_embeddings
        self.limit = limit or max(1, min(LIMIT, context // 4))
        self.room = context - self.limit  # tokens of a prompt
        if self.room < 1:
            raise ValueError(
                f"--limit {limit}: {folder} has a context of {context} tokens; wanted fewer"
            )

    def can_hear(self, words=None):
        """A ValueError for a model that hears nothing, or would have to be told the words."""
        if not self.ears:
            raise ValueError(
                f"{self.folder} cannot hear (no speech.json); chat with a merged "
                "model, or type"
            )
        if words is None:
            wants_words(self.folder, self.ears)

    def hear(self, sound, name, words=None):
        """(units, seconds) of samples, or of an audio.Recording. words: what is said, if told."""
        self.can_hear(words)
        seconds = len(sound) / audio.SAMPLE_RATE
        if len(sound) < self.ears.hop:
            raise ValueError(
                f"{name}: {len(sound)} samples at 16 kHz, too short to hear anything"
            )
        if seconds > self.ears.most:
            raise ValueError(
                f"{name}: {seconds:.0f} s of sound, this model hears {self.ears.most} s at "
                "once; give a part of it"
            )
        if seconds * SLOWEST > self.room:
            raise ValueError(
                f"{name}: {seconds:.0f} s of sound, more than the model's context of "
                f"{self.room} tokens can hold; give a part of it"
            )
        return hear(self.ears, sound[:], words), seconds

    def prompt(self, content):
        """Add a turn to the conversation; the ids up to its reply. Old turns go for new ones."""
        system = [message for message in self.messages[:1] if message["role"] == "system"]
        turn = {"role": "user", "content": content}
        alone = len(self.vocab.turn([*system, turn]))
        if alone > self.room:  # told before anything is forgotten for it
            raise ValueError(
                f"the turn alone takes {alone} tokens, the model's context leaves "
                f"{self.room}; say less at once"
            )

        self.messages.append(turn)
        self.forgotten = 0
        while len(prompt := self.vocab.turn(self.messages)) > self.room:
            del self.messages[len(system) : len(system) + 2]
            self.forgotten += 1
        return prompt

    def reply(self, content):
        """Yield the reply to a turn (text, units, or a list of both), whole characters only.

        The turn and what was said of the reply join the conversation, also when the
        caller stops early.
        """
        prompt = self.prompt(content)
        vocab = self.vocab
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        text = ""
        times = []
        self.cut = False
        began = time.perf_counter()
        try:
            for ids in generate(
                self.model,
                [torch.tensor(prompt)],
                self.limit,
                vocab.stop,
                vocab.text_rows(),
                self.temperature,
                seed=self.draw.getrandbits(31),
            ):
                times.append(time.perf_counter() - began)
                piece = characters.decode(vocab.bytes_of.get(int(ids[0]), b""))
                text += piece
                yield piece
            self.cut = len(times) == self.limit and int(ids[0]) not in vocab.stop
        finally:
            self.messages.append({"role": "assistant", "content": text})
            if times:
                self.took = speeds(len(prompt), times)

    def heard(self, units):
        """What was said: the transcript in the turn, or the model's own of units."""
        if isinstance(self.vocab, Listener):  # it stands in the turn
            return self.vocab.transcripts.get(int(units[0]), "")
        if isinstance(units, Said):
            return units.text()
        return written_down(self.model, self.vocab, units)

    def begin(self, system=None):
        """Forget the conversation, and begin one with a system message.

        None keeps the one there was; an empty one takes it away.
        """
        kept = [message for message in self.messages if message["role"] == "system"]
        if system is not None:
            kept = [{"role": "system", "content": system}] if system else []
        self.messages = kept
        if self.ears:
            self.ears.forget()


def speeds(read, times):
    """How fast a reply came: `read` tokens of the prompt, then one at each of `times` (seconds)."""
    writing = max(1e-9, times[-1] - times[0])
    return {
        "prompt_tokens": read,
        "prefill_per_second": round(read / times[0], 1),
        "reply_tokens": len(times),
        "decode_per_second": round((len(times) - 1) / writing, 1),
        "first_token_seconds": round(times[0], 3),
    }


# --- what a turn is made of ---------------------------------------------------


def parts_of(line):
    """A line as its parts, [text or Path]: a path to audio, whole or among words, is spoken."""
    path = expanded(line.strip("'\""))
    looks = path.suffix.lower() in SOUND or line.startswith(("/", "./", "../", "~"))
    if looks and " " not in line or os.path.isfile(path):  # it takes a name of any length
        return [path]

    # A quote opens before a word and closes behind one; an apostrophe inside a word is none.
    parts, text = [], []
    for word in re.findall(WORD, line):
        name = word[1:-1] if re.fullmatch(QUOTED, word) else re.sub(r"\\(.)", r"\1", word)
        if Path(name).suffix.lower() in SOUND and name[0] not in "'\"":
            parts += [" ".join(text), expanded(name)]
            text = []
        else:
            text.append(word)
    if not parts:
        return [line]
    return [part for part in [*parts, " ".join(text)] if part]


def expanded(text):
    """The path that a text is, "~" being home; it may hold what no path can, like a zero byte."""
    try:
        return Path(os.path.expanduser(text))
    except ValueError:
        return Path(text)


def record():
    """Samples from the microphone until Enter."""
    try:
        import sounddevice
    except (ImportError, OSError):
        raise ValueError(
            "to speak, install sounddevice (pip) and PortAudio (on Debian: "
            "libportaudio2); or give the path of a recording"
        ) from None
    blocks = [np.zeros(0, np.float32)]
    try:
        with sounddevice.InputStream(
            audio.SAMPLE_RATE,
            channels=1,
            dtype="float32",
            callback=lambda x, *_: blocks.append(x[:, 0].copy()),
        ):
            input("[speak; Enter ends it] ")
    except sounddevice.PortAudioError as error:
        raise ValueError(f"no microphone: {error}") from None
    return np.concatenate(blocks)


def told_words(part):
    """(what stands in quotes where a text begins, or None; the rest of the part)."""
    quoted = isinstance(part, str) and re.match(r'"\s*([^"\s][^"]*)"\s*', part)
    return (quoted[1], part[quoted.end() :]) if quoted else (None, part)


def take(chat, parts, transcribe):
    """(content, notes) of a turn's parts: text, paths, or samples.

    Notes: seconds, units, and what was heard if `transcribe`.
    """
    content = []
    notes = {"seconds": 0.0, "units": 0, "heard": []}
    parts = list(parts)
    for n, part in enumerate(parts):
        if isinstance(part, str):
            if part:
                content.append(f" {part}" if content else part)
            continue
        if isinstance(part, Path):
            words = None
            if chat.ears and chat.ears.lacks_words and n + 1 < len(parts):
                words, parts[n + 1] = told_words(parts[n + 1])
            units, seconds = chat.hear(audio.Recording(part), part, words)
        else:
            units, seconds = chat.hear(part, "the recording")
        content.append(units)
        notes["seconds"] = round(notes["seconds"] + seconds, 2)
        notes["units"] += units.words() if isinstance(units, Said) else len(units)
        if transcribe and (said := chat.heard(units)):
            notes["heard"].append(said)
    return content, {name: value for name, value in notes.items() if value}


def one_line(error):
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- answering: on a screen, for programs -------------------------------------


def turn(chat, parts, transcribe=False):
    """Answer a turn on the screen. True if it went well; a bad input is one line on stderr."""
    try:
        content, notes = take(chat, parts, transcribe)
        if "units" in notes:
            paths = ", ".join(str(part) for part in parts if isinstance(part, Path))
            heard = f"{notes['units']} {chat.ears.makes}"
            print(f"[{paths or 'the recording'}: {notes['seconds']:.2f} s, {heard}]")
        for heard in notes.get("heard", []):
            print(f"heard: {heard}")
        print("model: ", end="", flush=True)
        for piece in chat.reply(content):
            print(piece, end="", flush=True)
        print()
        if chat.cut:
            print(f"[cut after {chat.limit} tokens; --limit gives it more]")
        if chat.forgotten:
            print(f"[the {chat.forgotten} oldest turns no longer fit and are forgotten]")
        took = chat.took
        print(
            f"[{took['prompt_tokens']} tokens read at {took['prefill_per_second']:.0f} a second, "
            f"{took['reply_tokens']} written at {took['decode_per_second']:.0f}, the first after "
            f"{took['first_token_seconds']:.2f} s]"
        )
        return True
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a GPU's memory is full
        print(f"cannot answer that: {one_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(" [stopped]")
    return False


def for_programs(chat, lines, transcribe):
    """JSON lines {"text"?, "audio"? (a path or several), "system"?, "reset"?} in.

    {"reply", ...} or {"error"} out, a line for each.
    """
    for line in lines:
        try:
            answer = answer_json(chat, line, transcribe)
        except (ValueError, OSError, TypeError, RuntimeError) as error:
            answer = {"error": one_line(error)}
        print(json.dumps(answer), flush=True)  # in ASCII, which any terminal or pipe takes


def answer_json(chat, line, transcribe):
    """What is printed for a JSON line, str or bytes."""
    line = line if isinstance(line, str) else line.decode()  # not UTF-8 is a ValueError
    asked = json.loads(line)
    if (
        not isinstance(asked, dict)
        or not {"text", "audio", "system", "reset"} & asked.keys()
    ):
        raise ValueError(f'got {line.strip()[:60]}, wanted {{"text": ..., "audio": ...}}')
    if not isinstance(asked.get("system") or "", str):
        raise ValueError(f"got system = {str(asked['system'])[:40]}, wanted a string")
    if "system" in asked:
        chat.begin(asked["system"] or "")
    elif asked.get("reset"):
        chat.begin()

    sound = asked.get("audio") or []
    parts = [Path(path) for path in ([sound] if isinstance(sound, str) else sound)]
    if asked.get("text"):
        parts.append(str(asked["text"]))
    if not parts:
        return {"reply": ""}
    content, notes = take(chat, parts, transcribe)
    answer = {"reply": "".join(chat.reply(content)), **notes, **chat.took}
    if chat.cut:
        answer["cut"] = True
    if chat.forgotten:
        answer["forgotten_turns"] = chat.forgotten
    return answer


def converse(chat, transcribe):
    """Ask for lines and answer them, until :quit or the end of the input."""
    try:
        import readline  # noqa: F401       history and editing, as in a shell
    except ImportError:
        pass
    print(HELP)
    while True:
        try:
            line = input("you: ").strip()
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            print("cannot answer that: not UTF-8 text", file=sys.stderr)
            continue
        except KeyboardInterrupt:  # as in a shell: a fresh line
            print()
            continue

        command, _, rest = line.partition(" ")
        if command == ":quit":
            return
        if command == ":reset":
            chat.begin()
        elif command == ":system":
            chat.begin(rest.strip())
        elif command == ":why":
            ids = chat.vocab.chat(chat.messages).ids
            print(chat.vocab.spelled(ids) if chat.messages else "nothing was said yet")
        elif command == ":rec":
            try:
                chat.can_hear()  # told before anyone speaks
                turn(chat, [record()], transcribe)
            except (ValueError, OSError, EOFError) as error:
                print(f"cannot answer that: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print(" [stopped]")
        elif command.startswith(":"):
            print(HELP)
        elif line:
            turn(chat, parts_of(line), transcribe)


def main():
    parser = argparse.ArgumentParser(
        description="Talk to a model: audio files are spoken turns, lines typed ones."
    )
    add = parser.add_argument
    add("folder", help="a merged model folder (an instruct model can be typed to)")
    add("audio", nargs="*", help="audio files to answer, one after the other; then exit")
    add(
        "--transcribe",
        action="store_true",
        help="show its own transcript of a spoken turn before it answers (the toy's sum of units "
        "answers well, and writes a poor one)",
    )
    add(
        "--json",
        action="store_true",
        help='for programs: JSON lines {"text", "audio", "system", '
        '"reset"} in, {"reply", ...} or {"error"} out',
    )
    add(
        "--temperature",
        type=runs.not_negative,
        default=0.0,
        help="0 always gives the likeliest reply (default); 0.7 varies it",
    )
    add(
        "--limit",
        type=runs.count,
        help=f"tokens of a reply, at most (default {LIMIT}, or a quarter of the model's context)",
    )
    add_ears(parser)
    # Flags may stand between the folder and the audio.
    args = parser.parse_intermixed_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a letter
    chat = Chat(
        args.folder, args.device, args.hubert, args.temperature, args.transcriber, args.limit
    )
    if args.json:
        lines = [json.dumps({"audio": path}) for path in args.audio]
        for_programs(chat, lines or sys.stdin.buffer, args.transcribe)
    elif args.audio:
        done = [turn(chat, [Path(path)], args.transcribe) for path in args.audio]
        sys.exit(not all(done))
    else:
        converse(chat, args.transcribe)


if __name__ == "__main__":
    runs.run(main)
