import subprocess
import sys

import numpy as np
import pytest
import soundfile

from chat import Chat, turn
from conftest import ROOT


@pytest.fixture
def chat(speedrun):
    return Chat(speedrun / "merged")


def test_spoken_and_typed_turns_share_one_conversation(chat, speedrun):
    units, seconds = chat.listen(speedrun / "question.wav")
    assert 1 < seconds < 4 and len(units) > 10
    said = "".join(chat.reply(units))
    list(chat.reply("in one word"))
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2 and chat.messages[1]["content"] == said
    assert chat.vocab.speech["speech"] in chat.vocab.turn(chat.messages)


def test_pieces_are_whole_characters(chat, monkeypatch):
    import chat as module
    import torch
    monkeypatch.setattr(module, "generate", lambda *_: (torch.tensor([i]) for i in [*"né€".encode(), chat.vocab.eos]))
    pieces = list(chat.reply("x"))
    assert "".join(pieces) == "né€" and "\ufffd" not in "".join(pieces)


def test_a_long_conversation_forgets_its_oldest_turns_and_says_so(chat):
    chat.model.config.max_position_embeddings = 256 + 120
    for _ in range(4):
        said = "".join(chat.reply("x" * 40))
    assert "forgotten" in said and len(chat.messages) < 8
    with pytest.raises(ValueError, match="say less at once"):
        list(chat.reply("x" * 500))
    assert not chat.messages or chat.messages[-1]["content"] != "x" * 500


def test_every_bad_input_is_one_clear_line_and_the_loop_lives_on(speedrun, tmp_path):
    soundfile.write(tmp_path / "short.wav", np.zeros(50, np.float32), 16000)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "not audio.wav").write_bytes(b"hello" * 100)
    lines = [str(tmp_path / name) for name in ("missing.wav", "empty.wav", "not audio.wav", "short.wav")] + [str(tmp_path), f"'{speedrun}/question.wav'", "hi", ":help", ":quit"]
    done = subprocess.run([sys.executable, ROOT / "chat.py", speedrun / "merged", "--device", "cpu"], input="\n".join(lines), capture_output=True, text=True, timeout=60)
    errors = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 0 and len(errors) == 5 and all(e.startswith("cannot answer that: ") for e in errors), done.stderr
    assert done.stdout.count("model: ") == 2 and "units]" in done.stdout


def test_answers_to_given_files_end_with_a_status(speedrun, tmp_path):
    run = lambda *words: subprocess.run([sys.executable, ROOT / "chat.py", *map(str, words)], capture_output=True, text=True, timeout=60)
    assert run(speedrun / "merged", tmp_path / "gone.wav").returncode == 1
    assert run(speedrun / "merged", "--temperature", "0.5", speedrun / "question.wav").returncode == 0
    done = run(tmp_path, speedrun / "question.wav")
    assert done.returncode == 1 and "config.json: missing" in done.stderr and "Traceback" not in done.stderr


def test_a_deaf_model_can_be_typed_to_but_not_spoken_to(speedrun, capsys):
    chat = Chat(speedrun / "instruct")
    assert turn(chat, "hi", False) and not turn(chat, str(speedrun / "question.wav"), False)
    assert "cannot hear" in capsys.readouterr().err
