import importlib.util
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import audio
from chat import Chat, converse, for_programs, parts_of, take, turn
from conftest import ROOT, call


@pytest.fixture
def chat(speedrun):
    return Chat(speedrun / "merged")


def test_spoken_and_typed_turns_share_one_conversation(chat, speedrun):
    units, seconds = chat.hear(audio.Recording(speedrun / "question.wav"), "question.wav")
    assert 1 < seconds < 4 and len(units) > 10
    said = "".join(chat.reply(units))
    list(chat.reply("in one word"))
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == said
    assert chat.vocab.speech["speech"] in chat.vocab.turn(chat.messages)


def test_pieces_are_whole_characters(chat, monkeypatch):
    import chat as module
    import torch

    monkeypatch.setattr(
        module, "generate",
        lambda *_, **named: (torch.tensor([i]) for i in [*"né€".encode(), chat.vocab.eos]),
    )
    pieces = list(chat.reply("x"))
    assert "".join(pieces) == "né€" and "\ufffd" not in "".join(pieces)


def test_a_long_conversation_forgets_its_oldest_turns_and_says_so(chat, capsys):
    chat.room = 120
    for _ in range(4):
        assert turn(chat, ["x" * 40])
    assert "oldest turns no longer fit and are forgotten]" in capsys.readouterr().out
    assert len(chat.messages) < 8
    before = list(chat.messages)
    with pytest.raises(ValueError, match="say less at once"):
        list(chat.reply("x" * 500))
    assert before and chat.messages == before, "a turn that is refused costs no other"


def test_a_reply_that_is_cut_is_said_to_be(chat, capsys):
    whole = "".join(chat.reply("hi"))
    assert not chat.cut or chat.took["reply_tokens"] == chat.limit
    chat.begin("")
    chat.limit = 1
    assert turn(chat, ["hi"]) and whole
    assert "[cut after 1 tokens; --limit gives it more]" in capsys.readouterr().out
    for_programs(chat, ['{"text": "hi"}'], False)
    assert json.loads(capsys.readouterr().out)["cut"] is True


def test_a_conversation_is_kept_within_what_the_model_was_trained_on(speedrun):
    context = Chat(speedrun / "merged").model.config.max_position_embeddings
    assert context == 256
    assert Chat(speedrun / "merged").room == 192, "a quarter is left for the reply"
    assert Chat(speedrun / "merged", limit=100).room == 156
    assert Chat(speedrun / "merged").limit == 64
    with pytest.raises(ValueError, match="--limit 256: .* has a context of 256 tokens"):
        Chat(speedrun / "merged", limit=256)


def test_at_a_temperature_the_same_turn_gets_different_replies(chat):
    chat.temperature, said = 5.0, set()
    for _ in range(3):
        chat.begin("")
        said.add("".join(chat.reply("hi")))
    assert len(said) > 1


def test_a_system_message_can_be_taken_away(chat):
    chat.begin("be brief")
    chat.begin("")
    assert chat.messages == []


@pytest.mark.parametrize(
    "line", ["知" * 200, "ж" * 200, "a" * 300, "/" + "x" * 300, "\ud800", "\x00"]
)
def test_a_line_of_any_letters_is_a_turn_or_one_line_of_refusal(chat, line, capsys):
    turn(chat, parts_of(line))
    assert "Traceback" not in capsys.readouterr().err


def test_every_bad_input_is_one_clear_line_and_the_loop_lives_on(
    speedrun, quick, tmp_path
):
    soundfile.write(tmp_path / "short.wav", np.zeros(50, np.float32), 16000)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "not audio.wav").write_bytes(b"hello" * 100)
    lines = [
        str(tmp_path / name) for name in ("missing.wav", "empty.wav", "not audio.wav", "short.wav")
    ] + [str(tmp_path), f"'{speedrun}/question.wav'", "hi", ":help", ":quit"]
    done = subprocess.run(
        [quick / "python", ROOT / "chat.py", speedrun / "merged", "--device", "cpu"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=60,
    )
    errors = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 0
    assert len(errors) == 5
    assert all(e.startswith("cannot answer that: ") for e in errors), done.stderr
    assert done.stdout.count("model: ") == 2 and "units]" in done.stdout


def test_answers_to_given_files_end_with_a_status(speedrun, quick, tmp_path, monkeypatch):
    for words, status in ((tmp_path / "gone.wav",), 1), (
        ("--temperature", "0.5", speedrun / "question.wav"),
        0,
    ):
        with pytest.raises(SystemExit) as end:
            call(
                ["chat.py", str(speedrun / "merged"), *map(str, words), "--device", "cpu"],
                monkeypatch,
            )
        assert int(end.value.code or 0) == status
    done = subprocess.run(
        [quick / "python", ROOT / "chat.py", tmp_path, speedrun / "question.wav"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "config.json: missing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "what, told",
    [
        (KeyboardInterrupt(), "[stopped]"),
        (EOFError("Ctrl-D"), "cannot answer that: Ctrl-D"),
        (ValueError("no microphone"), "cannot answer that: no microphone"),
    ],
)
def test_a_recording_that_is_stopped_or_fails_leaves_the_conversation(
    what, told, speedrun, monkeypatch, capsys
):
    import chat as module

    lines, chat = iter(["hi", ":rec", ":why"]), Chat(speedrun / "merged")

    def broken():
        raise what

    monkeypatch.setattr(module, "record", broken)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or stopped_for_good())

    def stopped_for_good():
        raise EOFError

    module.converse(chat, False)
    said = capsys.readouterr()
    assert told in said.out + said.err
    assert said.out.count("<|im_start|>") == 2, "the conversation is still there"


def test_a_deaf_model_can_be_typed_to_but_not_spoken_to(speedrun, monkeypatch, capsys):
    chat = Chat(speedrun / "instruct")
    assert turn(chat, ["hi"]) and not turn(chat, [speedrun / "question.wav"])
    assert "cannot hear" in capsys.readouterr().err
    lines = iter([":rec", ":quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("chat.record", lambda: pytest.fail("it let someone speak first"))
    converse(chat, False)
    assert "cannot hear" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, parts",
    [
        ("what is the capital of france", ["what is the capital of france"]),
        ("don't quote me", ["don't quote me"]),
        ("a.wav", [Path("a.wav")]),
        ("'my files/a b.wav'", [Path("my files/a b.wav")]),
        ("a.wav b.flac", [Path("a.wav"), Path("b.flac")]),
        ("spell the answer a.mp3", ["spell the answer", Path("a.mp3")]),
        ("/no/such", [Path("/no/such")]),
        ("voice.m4a", [Path("voice.m4a")]),
        (
            "first ./a.wav then 'b c.wav' and stop",
            ["first", Path("a.wav"), "then", Path("b c.wav"), "and stop"],
        ),
        ("he said 'a.wav", ["he said 'a.wav"]),
        (
            "what's in a.wav and what's in b.wav",
            ["what's in", Path("a.wav"), "and what's in", Path("b.wav")],
        ),
        ("don't answer, spell a.wav", ["don't answer, spell", Path("a.wav")]),
        ("spell a\\ b.wav", ["spell", Path("a b.wav")]),
        ('say "yes no" to a.wav', ['say "yes no" to', Path("a.wav")]),
        ("x" * 5000, ["x" * 5000]),
        ("~no-such-user/a.wav", [Path("~no-such-user/a.wav")]),
    ],
)
def test_a_line_is_words_and_the_paths_of_audio_in_it(line, parts):
    assert parts_of(line) == parts


def test_a_turn_may_hold_speech_and_words(chat, speedrun):
    content, notes = take(chat, ["spell it", speedrun / "question.wav"], transcribe=True)
    assert content[0] == "spell it"
    assert len(content[1]) == notes["units"]
    assert len(notes["heard"]) == 1
    list(chat.reply(content))
    ids = chat.vocab.chat(chat.messages).ids
    assert chat.vocab.speech["speech"] in ids
    assert "' it'" in chat.vocab.spelled(ids)
    assert chat.took["prompt_tokens"] > notes["units"]


def test_a_system_message_outlives_reset_and_overflow(chat):
    chat.begin("be brief")
    list(chat.reply("hi"))
    chat.begin()
    assert [m["role"] for m in chat.messages] == ["system"]
    chat.room = 60
    for _ in range(3):
        list(chat.reply("x" * 10))
    assert chat.messages[0]["role"] == "system"


def test_sound_too_long_for_the_context_is_refused_before_it_is_heard(chat, tmp_path):
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 8000, 1, "PCM_U8") as file:
        for _ in range(180):
            file.write(np.zeros(60 * 8000, np.float32))  # three hours
    with pytest.raises(ValueError, match="10800 s of sound, more than the model's context"):
        chat.hear(audio.Recording(tmp_path / "long.wav"), "long.wav")


def test_programs_write_and_read_json_lines(speedrun, tmp_path):
    asked = [
        {"text": "hi"},
        {"audio": str(speedrun / "question.wav")},
        {"audio": [str(speedrun / "question.wav")], "text": "in a note"},
        {"reset": True, "system": "be brief"},
        {"audio": str(tmp_path / "gone.wav")},
        {"audio": 3},
        {},
        [1],
    ]
    hostile = [
        b"no json", b"\xff\xfe", b"[" * 100_000, b'{"audio": "\\ud800.wav"}',
        b'{"text": "\\ud800"}', b'{"system": 5}', b'{"text": "still there"}',
    ]
    lines = "".join(json.dumps(row) + "\n" for row in asked).encode() + b"\n".join(hostile) + b"\n"
    done = subprocess.run(
        [
            sys.executable, ROOT / "chat.py", speedrun / "merged", "--json", "--transcribe",
            "--device", "cpu",
        ],
        input=lines,
        capture_output=True,
        timeout=120,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    said = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert done.returncode == 0 and len(said) == 15 and not done.stderr, done.stderr
    assert [("reply" in row, "error" in row) for row in said] == [(True, False)] * 4 + [
        (False, True)
    ] * 8 + [(True, False), (False, True), (True, False)]
    assert said[1]["units"] > 10
    assert said[1]["heard"]
    assert said[2]["first_token_seconds"] > 0
    assert "gone.wav" in said[4]["error"]


def test_a_program_is_told_how_many_turns_are_forgotten(chat, monkeypatch, capsys):
    chat.limit = 4  # tokens of a reply: a turn "hi" takes at most 20
    chat.room = 120
    for_programs(chat, [json.dumps({"text": text}) for text in ["hi"] * 3 + ["x" * 95]], False)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    forgotten = [row.get("forgotten_turns", 0) for row in rows]
    assert forgotten[:3] == [0, 0, 0] and forgotten[3] >= 2, "two short turns for a long one"
    assert len(chat.messages) == 2 * (4 - forgotten[3])


@pytest.mark.parametrize("line", ["~\x00", "~\ud800", "~nobody-of-this-name/\ud800.wav say"])
def test_a_line_that_no_path_can_be_does_not_end_the_chat(chat, line):
    assert turn(chat, parts_of(line)) in (True, False)


def test_a_programs_system_message_is_heeded_kept_and_taken_away(chat, capsys):
    for_programs(chat, ['{"system": "be brief", "text": "hi"}'], False)
    assert chat.messages[0] == {"role": "system", "content": "be brief"}
    assert len(chat.messages) == 3
    for_programs(chat, ['{"reset": true}'], False)
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    for_programs(chat, ['{"system": null}'], False)
    assert chat.messages == []


# --- a real terminal ---


class Terminal:
    """chat.py in a pseudo-terminal, typed to as a person types."""

    def __init__(self, *words):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execvpe(
                sys.executable,
                [sys.executable, "chat.py", *map(str, words)],
                os.environ | {"TERM": "dumb", "TQDM_DISABLE": "1"},
            )
        self.seen = self.until("you: ")

    def until(self, wanted, seconds=60, said=""):
        """What is shown up to `wanted`, after what was seen before."""
        end = time.monotonic() + seconds
        while wanted not in said:
            assert time.monotonic() < end, f"waited for {wanted!r}, saw {said[-2000:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                # The other side has ended.
                try:
                    said += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:
                    break
        return said

    def type(self, line, wanted="you: "):
        os.write(self.fd, (line + "\r").encode())
        return self.until(wanted, said=self.until("\n").partition("\n")[2])


def test_a_whole_conversation_in_a_terminal_with_every_bad_input(speedrun, tmp_path):
    question, bad = speedrun / "question.wav", tmp_path / "bad inputs"
    bad.mkdir()
    (bad / "empty.wav").write_bytes(b"")
    (bad / "binary.wav").write_bytes(os.urandom(5000))
    (bad / "film.m4a").write_bytes(os.urandom(5000))
    soundfile.write(bad / "short.wav", np.zeros(50, np.float32), 16000)
    soundfile.write(bad / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    terminal = Terminal(speedrun / "merged", "--device", "cpu", "--transcribe")
    assert ":rec" in terminal.seen and "Ctrl-C" in terminal.seen
    said = terminal.type("hi there")
    assert "model: " in said and "the first after" in said
    said = terminal.type(f"'{question}'")
    assert "units]" in said and "heard: " in said and "model: " in said
    assert "units]" in terminal.type(f"{question} {question} in a note")
    assert "<|speech|>" in terminal.type(":why")
    assert ":quit" in terminal.type(":help")
    assert ":quit" in terminal.type(":nonsense")
    terminal.type(":system be brief")
    assert (
        terminal.type(":why").count("<|im_start|>") == 1
    ), "a conversation that is only its system message"
    terminal.type(":reset")
    for name, said in [
        ("missing.wav", "no such file"),
        ("empty.wav", "empty, 0 bytes"),
        ("binary.wav", "not audio that soundfile reads"),
        ("film.m4a", "ffmpeg -i film.m4a"),
        ("short.wav", "too short to hear"),
        ("nan.wav", "NaN"),
    ]:
        answer = terminal.type(f"'{bad / name}'")
        assert said in answer
        assert answer.count("cannot answer that") == 1
        assert "Traceback" not in answer, (name, answer)
    assert "a folder, wanted an audio file" in terminal.type(str(tmp_path))
    said = (
        terminal.type(":rec", wanted="you: ")
        if importlib.util.find_spec("sounddevice") is None
        else "install sounddevice"
    )
    assert "install sounddevice" in said
    os.write(terminal.fd, b"a long story\r")
    terminal.until("model: ")
    # Ctrl-C stops the reply, if it is still being written, and not the chat.
    os.write(terminal.fd, b"\x03")
    terminal.until("you: ")
    assert "model: " in terminal.type("still there")
    os.write(terminal.fd, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0


def test_replies_are_written_in_text_rows_alone(chat, monkeypatch):
    import chat as module
    import listen

    given = []

    def generate(model, prompts, limit, stop, allowed, *rest, **named):
        given.append((stop, allowed))
        return iter(())

    for room in (module, listen):
        monkeypatch.setattr(room, "generate", generate)
    list(chat.reply("x"))
    chat.heard(np.array([1, 2]))
    assert given == [(chat.vocab.stop, chat.vocab.text_rows())] * 2
